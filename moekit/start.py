"""Runs that start from another model's weights: reading and copying them, composed for the command line and others."""

from pathlib import Path

import torch

from moekit.config import RunConfig
from moekit.errors import ConfigError
from moekit.formats.checkpoint import load
from moekit.formats.directory import listing
from moekit.formats.tokenizer import load_tokenizer
from moekit.train.loop import Origin
from moekit.train.state import model_folder
from moekit.upcycle import copies


def origin(config: RunConfig) -> Origin:
    """Returns the weights that `config.init` names, made those of `config.model`; for `train`.

    Raises ConfigError where the models differ in more than copies can make, or the text is in another tokenizer's ids.
    """
    assert config.init is not None
    folder = model_folder(Path(config.init))
    source = load(folder, dtype=torch.float32)
    if (
        config.objective.kind != "sentences"
        and load_tokenizer(folder).fingerprint != load_tokenizer(config.data.path).fingerprint
    ):
        raise ConfigError(
            f"data.path {config.data.path} was prepared with another tokenizer than that of init, {folder}; "
            f"prepare it with --tokenizer {folder}"
        )
    model, report = copies.apply(source, config.model)
    return Origin(model, {"inputs": {"init": {"path": str(folder), "files": listing(folder)}}, "tensors": report})
