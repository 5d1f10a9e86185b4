"""What a run learns: to predict the next token, or masked ones."""

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


ObjectiveConfig = Annotated[NextTokenObjective | MaskedObjective, Field(discriminator="kind")]
