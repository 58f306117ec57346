"""A forward pass alone through all stages: for evaluation and generation."""

from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from coterie.comm.sequence import all_context_positions, context_part, gather
from coterie.models import Decoder
from coterie.models.decoder import DecoderOutput
from coterie.moe.tokens import TokenInfo
from coterie.parallel.micro_batch import by_row, local_info
from coterie.parallel.model import ParallelModel, Stage
from coterie.parallel.precision import Precision, autocast
from coterie.parallel.sharding import release


@torch.no_grad()
def forward(
    model: ParallelModel,
    tokens_BS: Tensor,
    info: TokenInfo,
    precision: Precision,
    see: Callable[[DecoderOutput], None] | None = None,
) -> Tensor | None:
    """Logits of this rank's positions and ids (B, S / cp, V / tp), None before the last stage.

    ``tokens_BS``: whole sequences; ``info``: of this rank's tokens; ``see`` is shown what each
    stage of this rank gives. All ranks call.
    """

    def job(decoder: Decoder, x: Tensor, micro: int) -> Tensor:
        with autocast(precision, model.ranks.device):
            output: DecoderOutput = decoder(x, info)
        if see is not None:
            see(output)
        return output.x

    def run(stage: Stage, x: Tensor) -> Tensor:
        stage.job = job
        y: Tensor = stage(x, torch.zeros(1, dtype=torch.int64))
        release(stage)
        return y

    return through_stages(model, tokens_BS, run)


def through_stages(
    model: ParallelModel, tokens_BS: Tensor, run: Callable[[Stage, Tensor], Tensor]
) -> Tensor | None:
    """One micro-batch through all stages, each of which ``run`` calls: what the last one gives,
    None on ranks without it. ``tokens_BS``: whole sequences. All ranks call."""
    ranks = model.ranks
    layout, axes, pipe = ranks.layout, ranks.axes, ranks.groups.get("pp")
    rows, length = tokens_BS.shape
    shape = (rows, length // (layout.cp * layout.tp), model.config.width + model.config.carried)
    dtype = next(model.parameters()).dtype
    x: Tensor | None = None
    for number, stage in zip(model.stage_numbers, model.each_stage(), strict=True):
        if number == 0:
            x = context_part(tokens_BS, axes.cp)
        elif layout.rank_of_stage(number - 1) != ranks.place.pp:
            x = torch.empty(shape, dtype=dtype, device=ranks.device)
            dist.recv(x, group=pipe, group_src=layout.rank_of_stage(number - 1))
        assert x is not None
        x = run(stage, x)
        if number == layout.stages - 1:
            return x
        if layout.rank_of_stage(number + 1) != ranks.place.pp:
            dist.send(
                x.to(dtype).contiguous(), group=pipe, group_dst=layout.rank_of_stage(number + 1)
            )
    return None


def whole_logits(
    model: ParallelModel, tokens_BS: Tensor, info: TokenInfo, precision: Precision
) -> Tensor:
    """Logits of all positions and ids (B, S, V), on every rank. All ranks call, those that share
    sequences with the same ones.

    ``info``: of whole sequences. Sequences are padded to what the layout can split.
    """
    ranks = model.ranks
    layout, axes = ranks.layout, ranks.axes
    rows, length = tokens_BS.shape
    unit = layout.tp * layout.cp * (2 if layout.cp > 1 else 1)
    padded = -(-length // unit) * unit
    tokens_BS = F.pad(tokens_BS, (0, padded - length))
    logits_BSV = forward(
        model, tokens_BS, local_info(_padded(info, rows, padded), rows, axes), precision
    )
    last = layout.rank_of_stage(layout.stages - 1)
    if logits_BSV is not None:
        logits_BSV = _all_ids(logits_BSV, model)
        logits_BSV = gather(logits_BSV, 1, axes.cp)
        order_S = all_context_positions(padded, axes.cp, ranks.device).argsort()
        logits_BSV = logits_BSV[:, order_S[:length]].contiguous()
    if layout.pp > 1:
        if logits_BSV is None:
            shape = (rows, length, model.config.vocabulary)
            dtype = torch.bfloat16 if precision == "bf16" else next(model.parameters()).dtype
            logits_BSV = torch.empty(shape, dtype=dtype, device=ranks.device)
        dist.broadcast(logits_BSV, group=ranks.groups["pp"], group_src=last)
    assert logits_BSV is not None
    return logits_BSV


def _all_ids(logits_BSV: Tensor, model: ParallelModel) -> Tensor:
    """The logits of all ranks of tp, whose last one may have fewer."""
    tp, vocabulary = model.ranks.axes.tp, model.config.vocabulary
    each = -(-vocabulary // tp.size)
    logits_BSV = F.pad(logits_BSV, (0, each - logits_BSV.shape[2]))
    return gather(logits_BSV, 2, tp)[..., :vocabulary]


def _padded(info: TokenInfo, rows: int, length: int) -> TokenInfo:
    """``info`` of sequences lengthened by padding."""

    def longer(x_T: Tensor | None, fill: int) -> Tensor | None:
        if x_T is None:
            return None
        x_BS = by_row(x_T, rows)
        return F.pad(x_BS, (0, length - x_BS.shape[1]), value=fill).flatten()

    position_BS = torch.arange(length).expand(rows, length)
    sequence_BS = torch.arange(rows)[:, None].expand(rows, length)
    device = info.padding_T.device if info.padding_T is not None else None
    return TokenInfo(
        token_T=longer(info.token_T, 0),
        modality_T=longer(info.modality_T, 0),
        padding_T=longer(info.padding_T, True),
        sequence_T=sequence_BS.to(device).flatten(),
        position_T=position_BS.to(device).flatten(),
        document_T=longer(info.document_T, -1),
        k=info.k,
    )
