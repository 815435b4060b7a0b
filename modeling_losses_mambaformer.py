"""Losses: the labels that count, and the number that divides their sum.

`Trainer` passes `num_items_in_batch`, the number of labels in all micro-batches of one optimizer step, and then leaves
the division to the model. A loss that ignores the count grows with the number of micro-batches.
"""

from typing import cast

import torch
from torch.nn import functional as F

IGNORED = -100


def causal_loss_arguments(
    labels: torch.Tensor,
    mask: torch.Tensor | None = None,
    starts: torch.Tensor | None = None,
    num_items_in_batch: torch.Tensor | int | None = None,
    shift_labels: torch.Tensor | None = None,
    **kwargs: object,
) -> dict:
    """Arguments of a causal loss in which only labels count that a token of the same sequence predicts.

    Pads are not targets, nor is the first real token of a sequence. `Trainer` counts labels from
    column 1 on, and so counts the first token after left pads as a target. The count is therefore scaled by the share
    of counted labels that are targets: the loss is the mean over targets, weighted by the batch's share of the count.

    Args:
        labels: (rows, tokens), -100 where there is no label.
        mask: boolean (rows, tokens), True at real tokens; `None` if every token is real.
        starts: boolean (rows, tokens), True at the first token of each packed sequence.
        num_items_in_batch: labels that `Trainer` has counted in all micro-batches of this step.
        shift_labels: (rows, tokens), labels that are shifted already: a token's label is its next token.
    """
    if mask is not None or starts is not None:
        predicted = _are_predicted(mask, starts)
        if shift_labels is None:
            counted, labels = labels[:, 1:], labels.masked_fill(~predicted, IGNORED)
            targets = labels[:, 1:]
        else:
            # The token after the last column is not part of this forward, so its label is not checked.
            has_target = F.pad(predicted[:, 1:], (0, 1), value=True)
            if mask is not None:
                has_target = has_target & (mask.cumsum(1) > 0)
            counted, shift_labels = shift_labels, shift_labels.masked_fill(~has_target, IGNORED)
            targets = shift_labels
        num_items_in_batch = _count_of_targets(num_items_in_batch, counted, targets)
    return {**kwargs, "labels": labels, "num_items_in_batch": num_items_in_batch, "shift_labels": shift_labels}


def _are_predicted(mask: torch.Tensor | None, starts: torch.Tensor | None) -> torch.Tensor:
    """Boolean (rows, tokens): real tokens that another real token of their sequence precedes."""
    if mask is None:
        return ~cast(torch.Tensor, starts)
    has_context = F.pad(mask.cumsum(1)[:, :-1] > 0, (1, 0))
    predicted = mask & has_context
    return predicted if starts is None else predicted & ~starts


def _count_of_targets(num_items: torch.Tensor | int | None, counted: torch.Tensor, targets: torch.Tensor):
    """`num_items`, less the share of `counted` labels that are no targets; unchanged when no target is left."""
    if num_items is None:
        return None
    counted, used = (counted != IGNORED).sum(), (targets != IGNORED).sum()
    if isinstance(num_items, torch.Tensor):
        num_items = num_items.to(counted.device)
    # The product comes first, because integers are exact and a quotient may be rounded.
    return torch.where(used > 0, num_items * used / counted.clamp(min=1), num_items)


def causal_lm_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    vocab_size: int,
    num_items_in_batch: torch.Tensor | int | None = None,
    ignore_index: int = IGNORED,
    shift_labels: torch.Tensor | None = None,
    **kwargs: object,
) -> torch.Tensor:
    """Cross-entropy of the next token, in float32 or in float64 where the logits are.

    It is the mean over targets, or their sum divided by `num_items_in_batch`. Without a target the mean is NaN and the
    divided sum is 0, as for other models of Transformers.
    """
    if shift_labels is None:
        shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    logits = _at_least_float32(logits).reshape(-1, vocab_size)
    return _cross_entropy(logits, shift_labels.reshape(-1), num_items_in_batch, ignore_index)


def _at_least_float32(logits: torch.Tensor) -> torch.Tensor:
    return logits if logits.dtype is torch.float64 else logits.float()


def _cross_entropy(logits, labels, num_items: torch.Tensor | int | None, ignore_index: int = IGNORED) -> torch.Tensor:
    labels = labels.to(logits.device, torch.long)
    if num_items is None:
        return F.cross_entropy(logits, labels, ignore_index=ignore_index)
    return _divide(F.cross_entropy(logits, labels, ignore_index=ignore_index, reduction="sum"), num_items)


def _divide(total: torch.Tensor, num_items: torch.Tensor | int) -> torch.Tensor:
    if isinstance(num_items, torch.Tensor):
        num_items = num_items.to(total.device, total.dtype)
    return total / num_items


# ---- classification


def problem_type_of(config, labels: torch.Tensor) -> str:
    """`config.problem_type`, or the problem type of these labels; the configuration does not change."""
    if config.problem_type is not None:
        return config.problem_type
    if config.num_labels == 1:
        return "regression"
    return "multi_label_classification" if labels.is_floating_point() else "single_label_classification"


def classification_loss(
    labels: torch.Tensor,
    pooled_logits: torch.Tensor,
    config,
    num_items_in_batch: torch.Tensor | int | None = None,
    **kwargs: object,
) -> torch.Tensor:
    """Loss of a classifier for each of the three problem types of Transformers.

    It is the mean over the labels, or their sum divided by `num_items_in_batch`.

    Args:
        labels: class indices (rows,), or values (rows, num_labels), which may be (rows,) for one label.
        pooled_logits: (rows, num_labels).

    Raises:
        ValueError: labels of another shape, or classes that do not exist.
    """
    check_class_labels(labels, (pooled_logits.shape[0], pooled_logits.shape[1]), config)
    logits, problem_type = _at_least_float32(pooled_logits), problem_type_of(config, labels)
    labels = labels.to(logits.device)
    if problem_type == "single_label_classification":
        return _cross_entropy(logits, labels.reshape(-1), num_items_in_batch)
    targets = labels.reshape(logits.shape).to(logits.dtype)
    loss = F.mse_loss if problem_type == "regression" else F.binary_cross_entropy_with_logits
    if num_items_in_batch is None:
        return loss(logits, targets)
    return _divide(loss(logits, targets, reduction="sum"), _count_of_values(num_items_in_batch, labels))


def check_class_labels(labels: torch.Tensor, shape: tuple[int, int], config) -> None:
    """Refuses labels that do not fit logits of this `shape`, (rows, num_labels).

    Raises:
        ValueError: labels have another shape, or are classes that do not exist.
    """
    if not isinstance(labels, torch.Tensor):
        raise ValueError(f"`labels` must be a tensor, got a {type(labels).__name__}.")
    problem_type, (rows, num_labels) = problem_type_of(config, labels), shape
    if problem_type != "single_label_classification":
        if labels.numel() != rows * num_labels:
            raise ValueError(
                f"`labels` of a {problem_type} must be {shape} like the logits, got {tuple(labels.shape)}."
            )
        return
    if labels.is_floating_point() or labels.numel() != rows:
        raise ValueError(
            f"`labels` of a single_label_classification must be {rows} class indices, one a row, got "
            f"{labels.dtype} of shape {tuple(labels.shape)}. For several labels a row give floats and set "
            "`config.problem_type`."
        )
    if labels.device.type == "cpu" and not torch.compiler.is_compiling():
        is_class = (labels == IGNORED) | ((labels >= 0) & (labels < num_labels))
        if not bool(is_class.all()):
            raise ValueError(f"`labels` must be class indices below {num_labels}, or -100 (ignored).")


def _count_of_values(num_items: torch.Tensor | int, labels: torch.Tensor) -> torch.Tensor:
    """`num_items` with the values of -100, which `Trainer` does not count although they are values here."""
    if isinstance(num_items, torch.Tensor):
        num_items = num_items.to(labels.device)
    return (num_items * labels.numel() / (labels != IGNORED).sum().clamp(min=1)).clamp(min=1)


__all__ = ["causal_lm_loss", "causal_loss_arguments", "check_class_labels", "classification_loss", "problem_type_of"]
