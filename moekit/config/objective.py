"""What a run learns: to predict the next token, masked ones, or the label of a sentence."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from moekit.config.strict import Strict


class NextTokenObjective(Strict):
    """Each token is predicted from those before it."""

    kind: Literal["next_token"] = Field("next_token", description="each token from those before it")


class MaskedObjective(Strict):
    """Masked tokens are predicted from those on both sides (BERT, arXiv 1810.04805, section 3.1)."""

    kind: Literal["masked"] = Field("masked", description="hidden tokens, from those on both sides")
    mask_probability: float = Field(0.15, gt=0, le=1, description="share of the tokens that is predicted")
    mask_share: float = Field(0.8, ge=0, le=1, description="of these, the share that the mask token stands for")
    random_share: float = Field(
        0.1, ge=0, le=1, description="of these, the share that becomes any token; the rest stays"
    )
    mask_token_id: int | None = Field(
        None, ge=0, description="the mask token; null: the first id behind the tokenizer's, for which model.vocab_size "
        "needs room"
    )  # fmt: skip

    @model_validator(mode="after")
    def _check(self) -> "MaskedObjective":
        if self.mask_share + self.random_share > 1:
            raise ValueError(f"random_share is {self.random_share} but mask_share, {self.mask_share}, leaves less")
        return self


Metric = Literal["accuracy", "f1", "matthews", "pearson", "spearman"]

_TASKS = "null: what the task says"


class SentencesObjective(Strict):
    """Sentences, or pairs of them, get a label or a number: files of one example a line, as in GLUE."""

    kind: Literal["sentences"] = Field("sentences", description="labels of sentences or pairs, from TSV or CSV files")
    task: Literal["sst2", "cola", "rte", "mrpc", "stsb"] | None = Field(
        None, description="a task of GLUE, which says how its files are read; null: the settings below do"
    )
    text: str | None = Field(
        None, description=f"column of the sentence: a name, or without header a number from 1; {_TASKS}"
    )
    pair: str | None = Field(None, description=f"column of the second sentence; {_TASKS}, or none")
    label: str | None = Field(None, description=f"column of the label; {_TASKS}")
    labels: tuple[str, ...] | None = Field(
        None, strict=False, description=f"labels as the file spells them, in order; none: numbers; {_TASKS}"
    )
    header: bool | None = Field(None, description=f"the first line names the columns; {_TASKS}, or true")
    separator: Literal["tab", "comma"] | None = Field(None, description=f"between columns; {_TASKS}, or tab")
    quoted: bool | None = Field(None, description=f"fields may stand in double quotes; {_TASKS}, or false")
    train: tuple[str, ...] | None = Field(
        None, strict=False, description=f"files in data.path to learn from; {_TASKS}, or train.tsv (.gz)"
    )
    valid: tuple[str, ...] | None = Field(
        None, strict=False, description=f"files in data.path to be judged by; {_TASKS}, or dev.tsv (.gz)"
    )
    metrics: tuple[Metric, ...] | None = Field(
        None, strict=False, description=f"what is measured; {_TASKS}, or accuracy; of numbers: pearson and spearman"
    )
    description: str | None = Field(None, description="the task in words, which MEO at level task routes by")


ObjectiveConfig = Annotated[NextTokenObjective | MaskedObjective | SentencesObjective, Field(discriminator="kind")]
