# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""The objective of a training run: named losses, their weights, their parameters and their training-only state.

An `Objective` is a list of parts. A part states what it needs of each image-caption pair (`rows`), what it compares
these rows with (`columns`) and its losses (`forward`). Rows are any nested structure of tensors whose first axis is the
pair. `MLIPTrainer` gathers, splits and logs such structures without knowing their fields, so a new part is one class:

    class Uniformity(ObjectivePart):
        name = "uniformity"

        def rows(self, model, outputs, inputs):
            return outputs.image_embeds                                                     # (R, P)

        def forward(self, model, rows, columns):
            return {"uniformity_loss": torch.cdist(rows, columns).square().mul(-2).exp().mean()}

    trainer = MLIPTrainer(..., objective=Objective([ModelLosses(), Uniformity(weight=0.1)]))

Parameters and buffers of a part (a decoder, prototypes, a teacher) exist in training only. `MLIPTrainer` optimises them
and stores them in checkpoints. They are never part of the saved model.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from modeling_mlip.losses import PairColumns, PairEmbeddings, TokenColumns

from .distributed import Exchange

TOKEN_LOSS_SCOPES = ("global", "local")


class ObjectivePart(nn.Module):
    """One or several named losses of a run.

    Args:
        weight: factor of every loss of this part in the total; see `weights`.

    Attributes:
        name: unique in an objective; prefix of the part's state in checkpoints.
        input_names: keys of the batch that this part alone needs. They are not given to the model.
        target_names: keys that `targets` adds to the batch.
        model_arguments: further arguments of the model's forward pass, such as `{"output_hidden_states": True}`.
    """

    name: str
    input_names: tuple[str, ...] = ()
    target_names: tuple[str, ...] = ()
    model_arguments: dict[str, Any] = {}

    def __init__(self, weight: float = 1.0):
        super().__init__()
        self.weight = weight

    def targets(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor | None]:
        """What the losses need of each of the R pairs that does not depend on the trained model: a teacher's output.

        It is computed once for each pair, without a graph, while mini-batches compute `rows` twice.

        Args:
            inputs: the batch.

        Returns:
            The tensors `(R, ...)` named by `target_names`. They become keys of the `inputs` of `rows`.
        """
        return {}

    def rows(self, model: nn.Module, outputs: Any, inputs: dict[str, torch.Tensor]) -> Any:
        """What the losses need of each of the R pairs of this process.

        Args:
            model: the model as it is trained, wrapped by DDP or FSDP; call it for a further forward pass.
            outputs: `MLIPOutput` of the batch; `outputs.pairs` holds the rows of the model's own losses.
            inputs: the batch, with the keys of `input_names` and `target_names`.

        Returns:
            A nested structure of tensors `(R, ...)`.
        """
        raise NotImplementedError(f"{type(self).__name__} does not define rows().")

    def columns(self, model: nn.Module, rows: Any, exchange: Exchange) -> Any:
        """What the rows of this process are compared with: by default the rows of all processes, `(C, ...)`.

        Args:
            model: the model without a wrapper.
        """
        return exchange.gather(rows)

    def forward(self, model: nn.Module, rows: Any, columns: Any) -> dict[str, torch.Tensor]:
        """The losses by name, without weights: scalars, each a mean over the R rows.

        Args:
            model: the model without a wrapper, for its configuration and its scalar parameters.
        """
        raise NotImplementedError(f"{type(self).__name__} does not define forward().")

    def weights(self, model: nn.Module) -> dict[str, float]:
        """Weights by the name of the loss, where they differ from `weight`."""
        return {}

    def on_step_begin(self, model: nn.Module) -> None:
        """Called with the unwrapped model before each forward and backward pass."""

    def on_step_end(self, model: nn.Module) -> None:
        """Called with the unwrapped model after each optimizer step, for example to update a teacher."""


class ModelLosses(ObjectivePart):
    """The losses of `MLIPModel`, with the weights of its configuration.

    Args:
        token_loss_scope: negatives of the token loss if `token_loss_group_size` is None: "global", the pairs of all
            processes, or "local", those of this process. Groups never cross processes.

    Raises:
        ValueError: if `token_loss_scope` is unknown.
    """

    name = "model"

    def __init__(self, token_loss_scope: str = "global"):
        super().__init__()
        if token_loss_scope not in TOKEN_LOSS_SCOPES:
            raise ValueError(f"token_loss_scope={token_loss_scope!r}: choose one of {', '.join(TOKEN_LOSS_SCOPES)}.")
        self.token_loss_scope = token_loss_scope

    def rows(self, model: Any, outputs: Any, inputs: dict[str, torch.Tensor]) -> PairEmbeddings:
        return outputs.pairs

    def on_step_begin(self, model: Any) -> None:
        # The optimizer may have moved a temperature beyond its limit.
        model.clamp_logit_scales()

    def columns(self, model: Any, rows: PairEmbeddings, exchange: Exchange) -> PairColumns | None:
        """`None` with one process. Of the tokens, processes exchange those of captions and later the scores: image
        tokens, which are more, stay where they are. With the sigmoid loss, caption embeddings travel in chunks."""
        if len(exchange.rows) == 1:
            return None
        tokens = None
        config = model.config
        is_global = config.token_loss_type == "filip" and config.token_loss_group_size is None
        is_global = is_global and self.token_loss_scope == "global"
        if rows.tokens is not None and is_global:
            text_tokens, text_mask = exchange.gather((rows.tokens.text_tokens, rows.tokens.text_mask))
            tokens = TokenColumns(text_tokens, text_mask, swap_scores=exchange.swap_scores)
        rows = rows._replace(tokens=None)
        if config.instance_loss == "info_nce":
            return PairColumns(**{**exchange.gather(rows)._asdict(), "tokens": tokens})
        caption_keys, image_keys = exchange.gather((rows.caption_keys, rows.image_keys))
        return PairColumns(
            image_embeds=None,
            text_embeds=None,
            caption_keys=caption_keys,
            image_keys=image_keys,
            tokens=tokens,
            sum_over_chunks=exchange.sum_over_chunks,
        )

    def forward(self, model: Any, rows: PairEmbeddings, columns: PairColumns | None) -> dict[str, torch.Tensor]:
        losses = model.compute_losses(rows, columns)
        return {name: loss for name, loss in losses.items() if name != "loss"}

    def weights(self, model: Any) -> dict[str, float]:
        config = model.config
        return {
            "spatial_loss": 1.0,
            "frequency_loss": config.frequency_loss_weight,
            "token_loss": config.token_loss_weight,
        }


class Objective(nn.Module):
    """The parts of a run, their weighted sum and their state.

    Args:
        parts: at least one, with different names.

    Raises:
        ValueError: if there is no part, or two parts share a name.
    """

    def __init__(self, parts: Iterable[ObjectivePart]):
        super().__init__()
        parts = list(parts)
        names = [part.name for part in parts]
        if not parts or len(set(names)) < len(names):
            raise ValueError(f"Objective: got the parts {names}; give at least one part, each with a name of its own.")
        self.parts = nn.ModuleDict({part.name: part for part in parts})

    def _each_part(self) -> list[ObjectivePart]:
        return list(self.parts.values())  # type: ignore[arg-type]

    @torch.no_grad()
    def add_targets(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The batch with the targets of all parts; those that it contains are not computed again."""
        for part in self._each_part():
            if not inputs.keys() >= set(part.target_names):
                inputs = {**inputs, **part.targets(inputs)}
        return inputs

    def compute_rows(self, model: nn.Module, inputs: dict[str, torch.Tensor]) -> tuple[Any, dict[str, Any]]:
        """Runs the model on a batch. Returns its output and the rows of each part by name."""
        arguments: dict[str, Any] = {"return_pairs": True}
        own_inputs: set[str] = set()
        for part in self._each_part():
            arguments |= part.model_arguments
            own_inputs |= {*part.input_names, *part.target_names}
        inputs = self.add_targets(inputs)
        outputs = model(**{name: value for name, value in inputs.items() if name not in own_inputs}, **arguments)
        return outputs, {part.name: part.rows(model, outputs, inputs) for part in self._each_part()}

    def forward(self, model: nn.Module, rows: dict[str, Any], exchange: Exchange) -> dict[str, torch.Tensor]:
        """The named losses of this process and `loss`, their weighted sum.

        All are scaled by `exchange.row_share`: their mean over processes is the loss of all pairs as one batch.

        Args:
            model: the model without a wrapper.
            rows: as `compute_rows` returns them.

        Raises:
            ValueError: if two losses share a name.
        """
        losses: dict[str, torch.Tensor] = {}
        total: torch.Tensor | None = None
        for part in self._each_part():
            columns = part.columns(model, rows[part.name], exchange)
            weights = part.weights(model)
            for name, loss in part(model, rows[part.name], columns).items():
                if name in losses or name == "loss":
                    raise ValueError(f"Objective: part {part.name!r} returns {name!r}, which is taken; rename it.")
                losses[name] = loss
                weighted = weights.get(name, part.weight) * loss
                total = weighted if total is None else total + weighted
        if total is None:
            raise ValueError(f"Objective: the parts {list(self.parts)} returned no loss.")
        return {name: exchange.row_share * loss for name, loss in {**losses, "loss": total}.items()}

    def on_step_begin(self, model: nn.Module) -> None:
        for part in self._each_part():
            part.on_step_begin(model)

    def on_step_end(self, model: nn.Module) -> None:
        for part in self._each_part():
            part.on_step_end(model)

    def trained_parameters(self) -> list[nn.Parameter]:
        """The parameters of the parts that have a gradient."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]
