"""The report of a quickstart: one HTML file, pictures inside, that needs no network and runs no script.

All numbers come from metrics.jsonl and config.yaml of the runs, so the words follow the result, whichever way it goes.
"""

import re
import shlex
import string
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes

from moekit.config import DenseConfig, MoEConfig, preset_names
from moekit.data.shards import write_atomic
from moekit.generate.complete import Completion
from moekit.quickstart import experts, pictures
from moekit.quickstart.pictures import short
from moekit.quickstart.results import Result, read_result
from moekit.version import __version__

FILE = "report.html"
TEMPLATE = Path(__file__).parent / FILE
ONE_SEED = "One seed proves nothing: train again from other seeds before you believe a difference, or the lack of one."


def write_report(
    out: Path,
    runs: Mapping[str, Path],
    samples: Mapping[str, Sequence[Completion]],
    corpus: Mapping[str, Mapping[str, int]],
) -> Path:
    """Returns the path of `out`/report.html, written at once or not at all.

    `runs` holds the run under study and, if there is one, its baseline, by name; more are left out. `samples` are
    continuations by domain, `corpus` the documents, tokens and bytes of each domain's training text. Raises DataError
    for a run that has not logged a step yet.
    """
    named = zip(runs.items(), ("first", "second"), strict=False)
    results = [read_result(name, Path(path), theme) for (name, path), theme in named]
    study = results[0]
    parts = [
        _headline(results),
        _facts(results),
        _curves(results),
        _domains(results, corpus),
        experts.load_over_time(study),
        *map(experts.alarms, results),
        experts.specialists(study),
        _samples(study, samples),
        _next(study),
        _footer(results),
    ]
    page = string.Template(TEMPLATE.read_text(encoding="utf-8"))
    text = page.substitute(title=f"moekit: {escape(study.name)}", body="\n".join(filter(None, parts)))
    write_atomic(Path(out) / FILE, text.encode())
    return Path(out) / FILE


def _headline(results: Sequence[Result]) -> str:
    """The result in one sentence, then what it is worth."""
    study, other = results[0], results[1] if len(results) > 1 else None
    after = f"after {short(study.tokens)} tokens"
    if study.score is None:
        sentence = f"{study.html} reached a training loss of {study.train[-1]['loss']:.2f} nats per token {after}"
        deck = "There was no validation text, so nothing is known of how it does on text that it has not seen."
    elif other is None or other.score is None:
        sentence = f"{study.html} reached {study.score:.2f} bits per byte on unseen text {after}"
        deck = f"There is no baseline to compare it with. {ONE_SEED}"
    else:
        gap, ratio = study.score - other.score, other.flops / study.flops
        digits = 2 if abs(gap) >= 0.01 else 3
        kind = "a dense model" if isinstance(other.config.model.ffn, DenseConfig) else "another mixture of experts"
        cost = "of equal active compute" if abs(ratio - 1) < 0.05 else f"with {ratio:.2f} times its active compute"
        after = f"both {after}" if study.tokens == other.tokens else f"{after} and {short(other.tokens)}"
        sentence = (
            f"{study.html} reached {study.score:.{digits}f} bits per byte on unseen text, "
            f"{other.html}, {kind} {cost}, {other.score:.{digits}f}, {after}"
        )
        lead = f"{abs(gap):.3f} bits per byte, or {abs(gap) / max(study.score, other.score):.1%}"
        ahead = study if gap < 0 else other
        verdict = "That is a tie." if round(gap, 3) == 0 else f"{ahead.html} is ahead by {lead}."
        deck = f"{verdict} {ONE_SEED}"
    return f'<p class="eyebrow">moekit quickstart</p>\n<h1>{sentence}.</h1>\n<p class="deck">{deck}</p>'


def _facts(results: Sequence[Result]) -> str:
    facts: dict[str, Callable[[Result], str]] = {
        "parameters in total": lambda r: short(r.config.model.num_parameters),
        "parameters used for one token": lambda r: short(r.config.model.num_active_parameters),
        "training FLOPs per token": lambda r: short(r.flops),
        "tokens read": lambda r: short(r.tokens),
        "training time": lambda r: _duration(r.seconds),
        "tokens per second": lambda r: short(r.tokens / r.seconds),
        "of the measured matmul speed": lambda r: f"{np.median([line['matmul_share'] for line in r.train]):.0%}",
    }
    cells = []
    for label, fact in facts.items():
        values = (f'<dd class="{result.theme}">{fact(result)}</dd>' for result in results)
        cells.append(f"<div><dt>{label}</dt>{''.join(values)}</div>")
    return f'<dl class="grid facts">{"".join(cells)}</dl>'


def _key(results: Sequence[Result]) -> str:
    return pictures.key({result.name: f"var(--{result.theme})" for result in results})


def _curves(results: Sequence[Result]) -> str:
    def dots(axes: Axes, value: str, style: str) -> None:
        for result in results:
            points = np.array([(r["tokens"], r[value]) for r in result.evals]).reshape(-1, 2).T
            colour, edge = pictures.THEME[result.theme], pictures.THEME["paper"]
            axes.plot(*points, style, color=colour, mec=edge, mew=0.8, ms=5.5, lw=1.7)
        pictures.grid_lines(axes)

    def loss(axes: Axes) -> None:
        for result in results:
            tokens, values = (
                pictures.pool([r[k] for r in result.train], 4 * pictures.POINTS) for k in ("tokens", "loss")
            )
            colour = pictures.THEME[result.theme]
            axes.plot(tokens, values, color=colour, alpha=0.35, linewidth=0.9)
            axes.plot(tokens, pictures.smooth(values), color=colour, linewidth=1.7)
        dots(axes, "loss", "o")

    caption = "<strong>Loss</strong>, nats per token; lines: training, dots: unseen text"
    figures = [pictures.figure(caption, "loss over the tokens read", loss, x="tokens read")]
    if any(result.evals for result in results):
        caption, label = "<strong>Bits per byte</strong> on unseen text", "bits per byte over the tokens read"
        figures.append(pictures.figure(caption, label, lambda axes: dots(axes, "bits_per_byte", "o-"), x="tokens read"))
    return pictures.section(
        "How they learned" if len(results) > 1 else "How it learned",
        "The loss says how surprising the next token is to a model, on average. The faint line is as measured, the "
        "strong one lightly smoothed. On unseen text every domain counts the same, in training a large one counts "
        "more, so the dots need not lie on the lines.",
        _key(results),
        pictures.grid("two", figures),
    )


def _domains(results: Sequence[Result], corpus: Mapping[str, Mapping[str, int]]) -> str:
    """The table of bits per byte, with the training text beside it; empty without validation text."""
    judged = [result for result in results if result.evals]
    if not judged:
        return ""
    tokens = sum(counts["tokens"] for counts in corpus.values())
    scores = [{name: s["bits_per_byte"] for name, s in r.evals[-1]["domains"].items()} for r in judged]
    rows = []
    for name in scores[0]:
        counts = corpus.get(name)
        text = ["", "", ""]
        if counts:
            text = [f"{counts['documents']:,}", short(counts["tokens"]), f"{counts['tokens'] / max(tokens, 1):.0%}"]
        rows.append("<tr>" + _cells([escape(name), *text], [score.get(name) for score in scores]) + "</tr>")
    documents = sum(counts["documents"] for counts in corpus.values())
    mean = ["mean of the domains", *([f"{documents:,}", short(tokens)] if corpus else ["", ""]), ""]
    rows.append('<tr class="mean">' + _cells(mean, [result.score for result in judged]) + "</tr>")
    heads = ["domain", "documents", "tokens", "share", *(result.html for result in judged)]
    heads += ["difference"] if len(judged) > 1 else []
    return pictures.section(
        "How well they know each kind of text" if len(judged) > 1 else "How well it knows each kind of text",
        "Bits per byte is how many bits a model needs for one byte of text that it has not seen: lower is better, 8 is "
        "a blind guess, and it does not depend on the tokenizer. Documents and tokens are those of the training text."
        + (" The better number is bold." if len(judged) > 1 else ""),
        f'<div class="wide"><table><thead><tr>{"".join(f"<th>{head}</th>" for head in heads)}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>",
    )


def _cells(texts: Sequence[str], values: Sequence[float | None]) -> str:
    """The cells of a row: texts, values (of two the lower is bold, unless they print alike), and their difference."""
    printed = ["" if value is None else f"{value:.3f}" for value in values]
    if len(values) == 2:
        ours, theirs = values
        difference = ""
        if ours is not None and theirs is not None:
            difference = f"{ours - theirs:+.3f} ({ours / theirs - 1:+.1%})".replace("-", "\u2212")
            if printed[0] != printed[1]:
                lower = int(theirs < ours)
                printed[lower] = f"<b>{printed[lower]}</b>"
        printed.append(difference)
    return "".join(f"<td>{cell}</td>" for cell in (*texts, *printed))


def _samples(result: Result, samples: Mapping[str, Sequence[Completion]]) -> str:
    ends = {"end": "ended by itself", "stop": "ended at a stop string", "length": "cut off"}
    cards = [
        f'<figure class="sample"><figcaption><strong>{escape(domain)}</strong>, {one.tokens} new tokens, '
        f'{escape(ends.get(one.finish, one.finish))}</figcaption><blockquote dir="auto"><span class="prompt">'
        f'{_text(one.prompt)}</span><span class="text">{_text(one.text)}</span></blockquote></figure>'
        for domain, completions in samples.items()
        for one in completions
    ]
    if not cards:
        return ""
    intro = (
        f"{result.html} goes on with texts that it has not seen: the prompt is grey, what the model wrote is "
        "underlined. A small model that has read little gets the look of a text long before it makes sense."
    )
    return pictures.section("What it writes", intro, f'<div class="samples">{"".join(cards)}</div>')


def _text(text: str) -> str:
    """Returns the text escaped; control characters, which HTML forbids, become replacement characters."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "\ufffd", escape(text.replace("\r\n", "\n")))


def next_steps(result: Result) -> list[tuple[str, str]]:
    """Returns five things to try after a run, each a reason and a command."""
    config, folder, ffn = result.config, result.path.parent, result.config.model.ffn
    again = ["train", str(result.path / "config.yaml"), "--out"]
    steps = [
        ("Let it write.", ["generate", str(result.path), "--prompt", "The ", "--temperature", "0.7"]),
        (
            "Was it luck? The same run from another seed.",
            [*again, str(folder / "another-seed"), "--seed", str(config.seed + 1)],
        ),
    ]
    coarse = f"{result.name.partition('-')[0]}-gshard"
    if coarse in preset_names() and coarse != result.name:
        same = ["--steps", str(config.steps), "--schedule.warmup_steps", str(config.schedule.warmup_steps)]
        steps.append(
            (
                "The paper's question: do many small experts beat a few large ones of the same total size (GShard)?",
                ["train", coarse, "--data", config.data.path, "--out", str(folder / coarse), *same],
            )
        )
    if isinstance(ffn, MoEConfig) and ffn.aux_loss_alpha and not ffn.global_aux:
        steps.append(
            (
                "Train without the balance loss, and see what becomes of the load.",
                [*again, str(folder / "no-balance-loss"), "--model.ffn.aux_loss_alpha", "0"],
            )
        )
    steps += [
        (
            "Use your own text: jsonl, txt or parquet, in files or folders. Then train with --data.",
            ["prepare", "my-texts", "--out", str(folder / "my-data"), "--vocab-size", str(config.model.vocab_size)],
        ),
        ("See what the paper's 16B model costs.", ["plan", "deepseekmoe-16b"]),
        ("See which other models there are.", ["presets"]),
    ]
    return [(why, shlex.join(["moekit", *words])) for why, words in steps[:5]]


def _next(result: Result) -> str:
    items = "".join(f"<li>{escape(why)}<pre>{escape(command)}</pre></li>" for why, command in next_steps(result))
    return pictures.section("What to try next", "", f'<ol class="next">{items}</ol>')


def _footer(results: Sequence[Result]) -> str:
    lines = [
        f"{result.html}: {result.train[-1]['step']} steps of {result.config.data.batch_size} x "
        f"{result.config.data.sequence_length} tokens, seed {result.config.seed}; all numbers are in "
        f"{escape(str(result.path / 'metrics.jsonl'))}"
        for result in results
    ]
    return f"<footer>{'<br>'.join(lines)}<br>written by moekit {__version__}</footer>"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d} min" if minutes < 100 else f"{minutes / 60:.1f} h"
