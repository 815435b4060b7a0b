"""Posteriors as files: the session of the candidates' cache, the beliefs after each column, and the candidates."""

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from .expert_vectors_mambaformer import ExpertVector
from .files_header_mambaformer import json_of
from .files_mambaformer import digest_of, has_valid_checksum, read_tensors, with_checksum, write_tensors

if TYPE_CHECKING:
    from .expert_posterior_mambaformer import ExpertPosterior
    from .modeling_mambaformer import MambaFormerForCausalLM

POSTERIOR_FORMAT, POSTERIOR_VERSION = "mambaformer.posterior", 1
SETTINGS = {"names": list, "active": list, "switching": float, "drop_below": float, "head": str}


def save_posterior(posterior: "ExpertPosterior", path: str | os.PathLike) -> None:
    """Writes `posterior` to `path`; see `ExpertPosterior.save`."""
    rows = posterior.rows
    tensors = {"log_prior": posterior.log_prior, "session": _session_of(posterior)}
    optional = {
        "token_ids": rows.token_ids,
        "mask": rows.mask,
        "predictions": rows.predictions,
        "log_probabilities": posterior.log_probabilities,
        "log_evidences": posterior.log_evidences,
    }
    tensors |= {name: tensor for name, tensor in optional.items() if tensor is not None}
    for number, candidate in enumerate(posterior.candidates):
        vectors = {} if candidate is None else candidate.vectors
        tensors |= {f"candidates.{number}.{module}": z.detach() for module, z in vectors.items()}
    tensors = {name: tensor.to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
    settings = {name: getattr(posterior, name) for name in SETTINGS if name != "head"}
    settings["head"] = _digest_of_head(posterior.model)
    header = {"format": POSTERIOR_FORMAT, "version": str(POSTERIOR_VERSION), "posterior": json.dumps(settings)}
    write_tensors(Path(path), tensors, with_checksum(header, tensors))


def load_posterior(path: str | os.PathLike, model: "MambaFormerForCausalLM") -> "ExpertPosterior":
    """The posterior of the file `path`, for `model`; see `ExpertPosterior.load`."""
    path = Path(path)
    tensors, header = read_tensors(path, POSTERIOR_FORMAT, POSTERIOR_VERSION, "`posterior.save(path)`")
    if not has_valid_checksum(header, tensors):
        raise ValueError(f"{path} is damaged: its content is not the content that was saved (checksum mismatch).")
    settings = json_of(header["posterior"])
    if not isinstance(settings, dict) or {name: type(value) for name, value in settings.items()} != SETTINGS:
        raise ValueError(f"{path} is damaged: its settings are {settings}.")
    if settings["head"] != _digest_of_head(model):
        raise ValueError(
            f"{path} has the evidence of another model head: load the weights that it was saved with, or observe the "
            "sequence again."
        )
    candidates = _candidates_of(tensors, settings["names"])
    prior = tensors["log_prior"].exp()
    posterior = model.make_posterior(candidates, prior, settings["switching"], settings["drop_below"])
    posterior.log_prior, posterior.active = tensors["log_prior"], settings["active"]
    rows, device = posterior.rows, model.device
    rows.candidates = [posterior.candidates[number] for number in posterior.active]
    with tempfile.TemporaryDirectory() as folder:
        session = Path(folder) / "session"
        session.write_bytes(tensors["session"].numpy().tobytes())
        rows.cache = model.load_cache(str(session))
    if "token_ids" in tensors:
        rows.token_ids, rows.mask = tensors["token_ids"].to(device), tensors["mask"].to(device)
        rows.predictions = tensors["predictions"].to(device) if "predictions" in tensors else None
        posterior.log_probabilities = tensors["log_probabilities"].to(device)
        posterior.log_evidences = tensors["log_evidences"].to(device)
    return posterior


def _session_of(posterior: "ExpertPosterior") -> Tensor:
    """The file of the cache, as bytes."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "session"
        posterior.rows.cache.save(path)
        return torch.from_numpy(np.frombuffer(path.read_bytes(), dtype=np.uint8).copy())


def _digest_of_head(model: "MambaFormerForCausalLM") -> str:
    return digest_of({name: each for name, each in model.lm_head.state_dict().items() if torch.is_tensor(each)})


def _candidates_of(tensors: Mapping[str, Tensor], names: list) -> list[ExpertVector | None]:
    candidates: list[ExpertVector | None] = []
    for number, name in enumerate(names):
        prefix = f"candidates.{number}."
        vectors = {key.removeprefix(prefix): z for key, z in tensors.items() if key.startswith(prefix)}
        candidates.append(ExpertVector(vectors, name) if vectors else None)
    return candidates


__all__ = ["load_posterior", "save_posterior"]
