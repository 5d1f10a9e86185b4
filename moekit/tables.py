"""What the verbs show to people: rich tables of the documents that --json prints."""

import re
from pathlib import Path
from shlex import quote
from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Column, Table

from moekit.config import preset

_MEMORY = {
    "weights": "float32",
    "compute_copy": "matrices in bfloat16",
    "gradients": "float32",
    "optimizer": "float32 moments",
    "activations": "what the backward pass needs",
    "buffers": "selection bias, hash tables",
    "merged_weights": "as many as exist at once",
    "training_total": "",
    "generation_weights": "in the precision of the compute",
    "kv_cache": "keys and values of all tokens",
    "generation_merged_weights": "while the prompts are read",
    "generation_total": "",
}


def plan_tables(name: str, summary: str, document: dict[str, Any]) -> list[Table | str]:
    """Returns parameters by role, FLOPs by both rules, memory, and the cache."""
    parameters, flops, memory, settings = (document[k] for k in ("parameters", "flops", "memory", "settings"))
    roles = table("parameters", ">total", ">active")
    for role, count in parameters["by_role"].items():
        if count["total"]:
            roles.add_row(role, f"{count['total']:,}", f"{count['active']:,}")
    roles.add_section()
    roles.add_row("all", f"{parameters['total']:,}", f"{parameters['active']:,}", style="bold")
    roles.add_row("without the input embedding", "", f"{parameters['active_without_embedding']:,}")

    length = flops["sequence_length"]
    compute = table("training FLOPs", f">per {length:,} tokens", "what is counted")
    merging = " and merging" if "merged_weights" in memory else ""
    exact = f"the real matrices, 6 per weight and token, {'' if merging else 'and '}full attention{merging}"
    compute.add_row("exact", short(flops["exact"]), exact)
    if "paper" in flops:
        compute.add_row(
            "paper", short(flops["paper"]), "the paper's rule: nominal FFN sizes, every layer MoE, no router"
        )

    where = f"{settings['batch']} x {length:,} tokens, {settings['precision']}, {settings['optimizer']}"
    space = table("memory", ">GiB", where + (", recompute" if settings["recompute"] else ""))
    for key, text in ((key, text) for key, text in _MEMORY.items() if key in memory):
        total = key.endswith("_total")
        space.add_row(key.replace("_", " "), f"{memory[key] / 2**30:,.3f}", text, style="bold" if total else "")
        if total:
            space.add_section()
    parts: list[Table | str] = [f"[bold]{escape(name)}[/bold]: {summary}", roles, compute, space]
    if cached := document["kv_cache_bytes_per_token"]:
        parts.append(f"KV cache: {cached:,} bytes per token (bfloat16)")
    return [*parts, *(_meo_table(document["meo_table"]) if "meo_table" in document else [])]


def _meo_table(found: dict[str, Any]) -> list[Table | str]:
    """Returns vanilla MoE against MEO by the number of experts chosen, and what is counted."""
    lines = table("MEO's table", ">vanilla MoE", ">MEO, 1 a weight", ">MEO, 2 a weight", ">of vanilla MoE")
    for line in found["lines"]:
        counts = [line[rule] for rule in ("dispatched", "merged_1", "merged_2")]
        shown = (f"{count / 1e9:,.2f}G" for count in counts)
        lines.add_row(f"m = {line['num_experts_per_tok']}", *shown, f"{counts[2] / counts[0]:.0%}")
    return [
        lines,
        f"FLOPs of one forward pass over {found['sequence_length']:,} tokens as MEO's paper counts them:\n"
        "attention, a masked-LM head, and a feed-forward part in which each linear map uses\n"
        "m experts. Vanilla MoE computes m of them; MEO merges m, at 1 or 2 FLOPs for each\n"
        "of their weights, and computes one. Gates, biases and norms are left out.",
    ]


def presets_tables(rows: list[dict[str, Any]]) -> list[Table | str]:
    """Returns one row per preset."""
    listed = table("preset", ">total", ">active", "shape")
    for row in rows:
        total, active = row["parameters"].values()
        listed.add_row(row["name"], short(total), short(active), row["description"])
    return [listed, "active: parameters used for one token, both embeddings included"]


BUSY = 0.25
"""Cores that others use, above which `doctor` says so."""


def doctor_tables(document: dict[str, Any]) -> list[Table | str]:
    """Returns the machine in a line each, and the back ends by precision."""
    versions, native = document["versions"], document["native"]
    parts: list[Table | str] = [
        f"[bold]{escape(document['name'])}[/bold] ({document['device']}), {versions['threads']} threads, "
        f"{versions['system']}, Python {versions['python']}, torch {versions['torch']}",
        f"native kernels: none, {escape(native['unavailable'])}"
        if native["unavailable"]
        else f"native kernels: vectors of {native['lanes']} floats, bfloat16 products "
        + ("on AMX" if native["amx"] else "on AVX-512" if native["bfloat16"] else "through float32")
        + (", codes in 8-bit integers" if native["rounds"] else ""),
        *(f"matrix products in {name}: {speed:,.0f} GFLOP/s" for name, speed in document["matmul_gflops"].items()),
    ]
    for precision, found in document["experts"].items():
        listed = table(f"experts in {precision}", ">training ms", ">decoding ms", "note")
        for backend, state in found["backends"].items():
            times = [f"{state['milliseconds'].get(work, float('nan')):,.2f}" for work in ("training", "decoding")]
            shown = times if state["milliseconds"] else ["", ""]
            note = state["unavailable"] or ("what auto takes" if backend == found["chosen"] else "")
            listed.add_row(backend, *shown, escape(note), style="bold" if backend == found["chosen"] else "")
        parts.append(listed)
    parts.append("training: 2,048 tokens forward and backward; decoding: one token; 64 experts, top-6, 512 x 192")
    if (load := document["other_load"]) and load > BUSY:
        parts.append(
            f"meanwhile other processes kept {load:.1f} cores busy: a quiet machine is faster, and on one that stays "
            "busy OMP_WAIT_POLICY=passive may be"
        )
    return parts


def prepare_tables(manifest: dict[str, Any], out: str) -> list[Table | str]:
    """Returns what each domain came to, and the command that goes on."""
    counts = table("split", "domain", ">documents", ">tokens", ">bytes")
    for split, content in manifest["splits"].items():
        for domain, count in content["domains"].items():
            counts.add_row(split, domain, *(f"{count[name]:,}" for name in ("documents", "tokens", "bytes")))
    vocabulary = manifest["vocab_size"]
    larger = f" --model.vocab_size {vocabulary}" if vocabulary > preset("tiny-deepseekmoe").vocab_size else ""
    prompts = manifest["arguments"]["prompt_field"] is not None
    whole = " --data.packing documents --data.cross_document_attention false" if prompts else ""
    lines: list[Table | str] = [counts]
    if (similar := manifest["similar"]) is not None:
        cosines = f"{similar['similarity']:.3f}, shuffled {similar['similarity_shuffled']:.3f}"
        lines.append(f"data.order similar: mean cosine of neighbours {cosines}")
    return [*lines, f"next: moekit train tiny-deepseekmoe{larger} --data {quote(out)} --out run{whole}"]


def convert_tables(receipt: dict[str, Any], out: str) -> list[Table | str]:
    """Returns the errors of like tensors together, and the checks."""
    alike: dict[tuple[str, str], list[float]] = {}
    for key, used in receipt["tensors"]["used"].items():
        if key.endswith("_scale"):
            continue
        name = re.sub(r"\.\d+\.", ".*.", key.removeprefix("model.")).removeprefix("layers.*.").removesuffix(".weight")
        change = used["from"] if used["from"] == used["to"] else f"{used['from']} -> {used['to']}"
        alike.setdefault((name, change), []).append(used["relative_rms"])
    errors = table("tensors", ">number", "precision", ">RMS error", ">largest")
    for (name, change), values in alike.items():
        exact = not any(values)
        shown = ["0", "0"] if exact else [f"{sum(values) / len(values):.5f}", f"{max(values):.5f}"]
        errors.add_row(name, f"{len(values):,}", change, *shown, style="dim" if exact else "")
    size = sum(file["bytes"] for name, file in receipt["outputs"].items() if name.endswith((".safetensors", ".gguf")))
    note = [receipt["config"]["note"]] if "note" in receipt["config"] else []
    to_gguf = receipt["config"].get("to") == "gguf"
    verb = f"generate {quote(out)} --prompt ..." if "tokenizer.json" in receipt["outputs"] else f"verify {quote(out)}"
    then = f"its receipt: {out}.receipt.json" if to_gguf else f"next: moekit {verb}"
    return [errors, _checks(receipt["checks"]), *note, f"{out}: {size / 2**20:,.1f} MiB of weights; {then}"]


def verify_tables(document: dict[str, Any]) -> list[Table | str]:
    """Returns the checks, where those fell that did, and the verdict."""
    fell = [check for check in document["checks"] if not check["held"]]
    places = [f"{check['name']}: {escape(place)}" for check in fell for place in check.get("of", ())]
    verdict = f"{len(fell)} of {len(document['checks'])} checks did not hold" if fell else "every check held"
    return [_checks(document["checks"]), *places, *document["notes"], f"{escape(document['model'])}: {verdict}"]


def inspect_tables(document: dict[str, Any]) -> list[Table | str]:
    """Returns each model's layers, what was found in words, and where the report is."""
    parts: list[Table | str] = []
    for model in document["models"]:
        columns = {key: key.replace("_", " ") for row in model["layers"] for key in row}
        listed = table(*(f">{name}" for name in columns.values()))
        for row in model["layers"]:
            listed.add_row(*(_number(row[key]) for key in columns))
        tokens = sum(model["tokens"].values())
        parts.append(f"[bold]{escape(model['model'])}[/bold]: {tokens:,} tokens of {len(model['tokens'])} domains")
        parts += [listed, *(f"  {escape(found)}" for said in model["findings"].values() for found in said), ""]
    if document["findings"]:
        parts += ["[bold]together[/bold]" if len(document["models"]) > 1 else "[bold]probes[/bold]"]
        parts += [*(f"  {escape(found)}" for found in document["findings"]), ""]
    return [*parts, f"the report: {document['report']}  ({document['seconds']:.0f} s in all)"]


def _number(value: float | None) -> str:
    return "none" if value is None else str(value) if isinstance(value, int) else f"{value:.4g}"


def _checks(checks: list[dict[str, Any]]) -> Table:
    listed = table("check", ">value", ">bound", "held")
    for check in checks:
        value = check["value"]
        shown = "none" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:.5f}"
        held = check["held"]
        listed.add_row(check["name"], shown, check["bound"], "yes" if held else "NO", style="" if held else "bold")
    return listed


def evaluate_tables(record: dict[str, Any]) -> list[Table | str]:
    """Returns one row per domain of text and one per task."""
    model = record["model"]
    parts: list[Table | str] = [
        f"[bold]{escape(model['path'])}[/bold]: {short(model['parameters'])} parameters, "
        f"{short(model['active_parameters'])} active, in {model['dtype']} on {model['device']}"
    ]
    if text := record.get("text"):
        columns = (">bits per byte", ">nats per token", ">perplexity", ">tokens", ">bytes", ">documents")
        listed = table("text", *columns)
        for domain, score in text["domains"].items():
            counts = (f"{score[name]:,}" for name in ("tokens", "bytes", "documents"))
            listed.add_row(escape(domain), *_text_scores(score), *counts)
        if len(text["domains"]) > 1:
            listed.add_row("mean of domains", *_text_scores(text["mean"]), style="bold")
        parts.append(listed)
    if questions := record.get("questions"):
        listed = table("questions", ">accuracy", ">+/-", ">n", "by length or answer")
        for name, found in questions.items():
            groups = ", ".join(f"{group} {share:.3f}" for group, share in found["by_group"].items())
            listed.add_row(name, f"{found['accuracy']:.4f}", f"{found['stderr']:.4f}", f"{found['n']:,}", groups)
        parts.append(listed)
    if found := record.get("sentences"):
        listed = table("sentences", *(f">{metric}" for metric in found["metrics"]), ">loss", ">examples", "note")
        measured = (f"{value:.4f}" for value in (*found["metrics"].values(), found["loss"]))
        note = f"{found['truncated']:,} cut" if found["truncated"] else ""
        name = found["task"] or ", ".join(Path(file).name for file in found["source"])
        listed.add_row(escape(name), *measured, f"{found['examples']:,}", note)
        parts.append(listed)
    if tasks := record.get("tasks"):
        listed = table("task", "metric", ">value", ">+/-", ">shots", ">items", "note")
        for name, task in tasks.items():
            note = f"{task['truncated']:,} requests cut" if task["truncated"] else ""
            for row, (metric, found) in enumerate(task["metrics"].items()):
                error = "" if found["stderr"] is None else f"{found['stderr']:.4f}"
                about = ("", "", "") if row else (f"{task['shots']}", f"{task['n']:,}", note)
                listed.add_row("" if row else name, metric, f"{found['value']:.4f}", error, *about)
        parts.append(listed)
        if any(task["truncated"] for task in tasks.values()):
            parts.append("cut: the prompt lost its beginning, because the model sees too few tokens for it")
    return parts


def _text_scores(score: dict[str, Any]) -> list[str]:
    return [f"{score['bits_per_byte']:.4f}", f"{score['loss']:.4f}", f"{score['perplexity']:,.2f}"]


def quickstart_tables(result: dict[str, Any]) -> list[Table | str]:
    """Returns bits per byte by domain and model, a sample, and what to try next."""
    scores = result["bits_per_byte"]
    by_domain = table("bits per byte on unseen text", *(f">{name}" for name in scores))
    for domain in next(iter(scores.values())):
        style = "bold" if domain == "mean" else ""
        by_domain.add_row(domain, *(f"{domains[domain]:.3f}" for domains in scores.values()), style=style)
    out, model = result["out"], next(iter(scores))
    return [
        by_domain,
        f"the report: {result['report']}  ({result['seconds']:.0f} s in all)",
        "\nwhat to try next:",
        f'  moekit generate {quote(out)}/{model} --prompt "Once upon a time" --temperature 0.8',
        "  moekit plan deepseekmoe-16b",
        "  moekit prepare YOUR_TEXT/ --out data",
        "  moekit train mini-deepseekmoe --data data --out run",
    ]


def table(*headers: str) -> Table:
    """Returns an empty table; a header that begins with > is a column of numbers."""
    columns = (Column(header.lstrip(">"), justify="right" if header[0] == ">" else "left") for header in headers)
    return Table(*columns, box=box.SIMPLE_HEAD, pad_edge=False)


def short(count: float) -> str:
    """Returns 16375728128 as 16.38B, 74.4e12 as 74.42T."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if count >= 0.999995 * size:  # what rounds up to the next unit is written in it
            return f"{count / size:,.2f}{unit}"
    return f"{count:g}"
