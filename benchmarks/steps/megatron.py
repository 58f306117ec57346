"""The same training step on megatron-core's own path.

Its GPTModel from the local layer spec, SequentialMLP experts (GroupedMLP needs a CUDA package), the
all-to-all dispatcher, its DistributedDataParallel, optimizer and 1F1B schedule. Where its makers
count on TransformerEngine or Apex, which have no CPU path, it gets PyTorch's nearest: fused
attention, ``nn.RMSNorm`` and fused AdamW.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.steps.megatron_cpu import import_megatron, on_cpu
from benchmarks.steps.model import Model, Split
from benchmarks.steps.weights import whole_weights


class MegatronStep:
    """A rank's model, optimizer and schedule; all ranks of the default group call.

    ``fused_attention``: PyTorch's; else megatron-core's own DotProductAttention.
    ``shard_optimizer``: its DistributedOptimizer (ZeRO-1).

    Raises:
        ImportError: megatron-core is not installed.
    """

    def __init__(
        self,
        model: Model,
        split: Split,
        fused_attention: bool = True,
        shard_optimizer: bool = False,
    ) -> None:
        import_megatron()
        self.description, self.split = model, split
        with on_cpu():
            _start(split)
            self.config = _transformer_config(model, split)
            gpt = _gpt(model, self.config, fused_attention)
            self.model = _data_parallel(self.config, gpt, shard_optimizer)
            self.optimizer = _optimizer(model, self.model, shard_optimizer)
            self.config.grad_scale_func = self.optimizer.scale_loss
            _load(self.model.module, whole_weights(model), model)
            self.optimizer.reload_model_params()

    @property
    def parameters(self) -> int:
        """Each rank adds its part, divided by the number of ranks that hold the same."""
        from megatron.core import parallel_state as state

        copies = state.get_data_parallel_world_size()
        expert_copies = state.get_expert_data_parallel_world_size()
        own = 0.0
        for name, p in self.model.module.named_parameters():
            split_by_tp = getattr(p, "tensor_model_parallel", False)
            same = copies if split_by_tp else copies * self.split.tp
            own += p.numel() / (expert_copies if ".experts." in name else same)
        whole = torch.tensor(own, dtype=torch.float64)
        dist.all_reduce(whole)
        return round(whole.item())

    def step(self, tokens_BC: Tensor) -> float | None:
        """As megatron-core's training loop does it, its report of the loss included."""
        with on_cpu():
            return self._step(tokens_BC)

    def _step(self, tokens_BC: Tensor) -> float | None:
        from megatron.core import parallel_state as state
        from megatron.core.pipeline_parallel import get_forward_backward_func

        own_BC = tokens_BC.chunk(self.split.dp)[state.get_data_parallel_rank()]
        micro_batches = self.split.micro_batches(self.description)
        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        reports = get_forward_backward_func()(
            forward_step_func=_forward,
            data_iterator=iter(own_BC.chunk(micro_batches)),
            model=self.model,
            num_microbatches=micro_batches,
            seq_length=self.description.sequence,
            micro_batch_size=self.description.micro_batch,
            forward_only=False,
        )
        succeeded, _, _ = self.optimizer.step()
        assert succeeded
        if not reports:  # this rank does not hold the last stage
            return None
        loss = torch.stack(reports).mean()
        dist.all_reduce(loss, group=state.get_data_parallel_group())
        return loss.item() / self.split.dp


def _start(split: Split) -> None:
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=split.tp,
            pipeline_model_parallel_size=split.pp,
            expert_model_parallel_size=split.ep,
            expert_tensor_parallel_size=split.etp,
        )
    torch.manual_seed(0)
    model_parallel_cuda_manual_seed(0)


def _transformer_config(model: Model, split: Split) -> Any:
    from megatron.core.distributed import finalize_model_grads
    from megatron.core.transformer import TransformerConfig

    return TransformerConfig(
        num_layers=model.layers,
        hidden_size=model.width,
        num_attention_heads=model.heads,
        ffn_hidden_size=model.hidden,
        normalization="RMSNorm",
        layernorm_epsilon=model.norm_eps,
        add_bias_linear=False,
        gated_linear_unit=True,
        activation_func=F.silu,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        num_moe_experts=model.experts,
        moe_ffn_hidden_size=model.hidden,
        moe_router_topk=model.k,
        moe_router_load_balancing_type="aux_loss",
        moe_aux_loss_coeff=model.balance_loss,
        moe_token_dispatcher_type="alltoall",
        tensor_model_parallel_size=split.tp,
        pipeline_model_parallel_size=split.pp,
        expert_model_parallel_size=split.ep,
        expert_tensor_parallel_size=split.etp,
        sequence_parallel=split.tp > 1,
        pipeline_dtype=torch.float32,
        batch_p2p_comm=False,
        deallocate_pipeline_outputs=True,
        finalize_model_grads_func=finalize_model_grads,
        use_cpu_initialization=True,
        # these need CUDA kernels
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
    )


class _Norm(nn.RMSNorm):
    """megatron-core's wrapper of torch's norms refuses sequence parallelism, which it demands of
    tensor-parallel mixtures of experts; its gradient sums look for this mark."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(hidden_size, eps)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


class _FusedAttention(nn.Module):
    """Causal softmax(q·kᵀ/√d)·v by PyTorch's fused kernel, in megatron-core's order of axes."""

    def __init__(self, *_: Any, **__: Any) -> None:
        super().__init__()

    def forward(self, q_SBHd: Tensor, k_SBHd: Tensor, v_SBHd: Tensor, *_: Any, **__: Any) -> Tensor:
        q_BHSd, k_BHSd, v_BHSd = (x.permute(1, 2, 0, 3) for x in (q_SBHd, k_SBHd, v_SBHd))
        y_BHSd = F.scaled_dot_product_attention(q_BHSd, k_BHSd, v_BHSd, is_causal=True)
        return y_BHSd.permute(2, 0, 1, 3).flatten(2)


def _gpt(model: Model, config: Any, fused_attention: bool) -> nn.Module:
    """This rank's stage of the model."""
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.transformer_block import (
        TransformerBlockSubmodules,
        get_num_layers_to_build,
    )

    layer = get_gpt_layer_local_spec(num_experts=model.experts, normalization="RMSNorm")
    layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = _Norm
    if fused_attention:
        layer.submodules.self_attention.submodules.core_attention = _FusedAttention
    layers = get_num_layers_to_build(config)
    return GPTModel(
        config,
        TransformerBlockSubmodules([layer] * layers, layer_norm=_Norm),
        vocab_size=model.vocabulary,
        max_sequence_length=model.sequence,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        position_embedding_type="rope",
        rotary_base=model.rope_theta,
        share_embeddings_and_output_weights=False,
    )


@torch.no_grad()
def _load(gpt: Any, weights: dict[str, Tensor], model: Model) -> None:
    """Fill this rank's part of the model from our whole weights."""
    from megatron.core import parallel_state as state

    tp, etp = (
        (state.get_tensor_model_parallel_rank(), state.get_tensor_model_parallel_world_size()),
        (state.get_expert_tensor_parallel_rank(), state.get_expert_tensor_parallel_world_size()),
    )
    local_experts = model.experts // state.get_expert_model_parallel_world_size()
    first = state.get_expert_model_parallel_rank() * local_experts

    def part(whole: Tensor, dim: int, place: tuple[int, int]) -> Tensor:
        rank, ranks = place
        return whole.chunk(ranks, dim)[rank]

    if gpt.pre_process:
        gpt.embedding.word_embeddings.weight.copy_(part(weights["embedding.weight"], 0, tp))
    for layer in gpt.decoder.layers:
        own = _of_block(weights, layer.layer_number - 1)
        attention, experts = layer.self_attention, layer.mlp.experts.local_experts
        layer.input_layernorm.weight.copy_(own["attention_norm.weight"])
        layer.pre_mlp_layernorm.weight.copy_(own["feed_forward_norm.weight"])
        # query, key and value of a head lie together
        heads = [own[f"attention.{x}.weight"].unflatten(0, (model.heads, -1)) for x in "qkv"]
        attention.linear_qkv.weight.copy_(part(torch.cat(heads, 1).flatten(0, 1), 0, tp))
        attention.linear_proj.weight.copy_(part(own["attention.out.weight"], 1, tp))
        layer.mlp.router.weight.copy_(own["moe.router.weight"])
        for number, expert in enumerate(experts, first):
            gate_up = own["moe.experts.w_in_EPFD"][number]
            expert.linear_fc1.weight.copy_(torch.cat([part(half, 0, etp) for half in gate_up]))
            down_DF = own["moe.experts.w_out_EFD"][number].t()
            expert.linear_fc2.weight.copy_(part(down_DF, 1, etp))
    if gpt.post_process:
        gpt.decoder.final_layernorm.weight.copy_(weights["norm.weight"])
        gpt.output_layer.weight.copy_(part(weights["head.weight"], 0, tp))


def _of_block(weights: dict[str, Tensor], block: int) -> dict[str, Tensor]:
    prefix = f"blocks.{block}."
    return {
        name.removeprefix(prefix): whole
        for name, whole in weights.items()
        if name.startswith(prefix)
    }


def _data_parallel(config: Any, gpt: nn.Module, shard_optimizer: bool) -> Any:
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    ddp = DistributedDataParallelConfig(
        use_distributed_optimizer=shard_optimizer, overlap_grad_reduce=True
    )
    wrapped = DistributedDataParallel(config, ddp, gpt)
    config.no_sync_func = wrapped.no_sync
    return wrapped


def _optimizer(model: Model, wrapped: Any, shard_optimizer: bool) -> Any:
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    config = OptimizerConfig(
        optimizer="adam",
        lr=model.lr,
        adam_beta1=model.betas[0],
        adam_beta2=model.betas[1],
        adam_eps=model.eps,
        weight_decay=model.weight_decay,
        clip_grad=model.clip,
        params_dtype=torch.float32,
        use_distributed_optimizer=shard_optimizer,
    )
    optimizer = get_megatron_optimizer(config, [wrapped])
    # without Apex it takes torch's AdamW, one tensor at a time; the fused one is what Apex gives
    for group in optimizer.param_groups:
        group["fused"], group["foreach"] = True, False
        group["weight_decay"] *= group["wd_mult"]  # else its learning-rate schedule does this
    return optimizer


def _forward(data: Iterator[Tensor], model: Any) -> tuple[Tensor, Any]:
    """A micro-batch's losses, (B, S), and what the schedule makes of them."""
    tokens_BC = next(data)
    tokens_BS = tokens_BC[:, :-1].contiguous()
    position_BS = torch.arange(tokens_BS.shape[1]).expand_as(tokens_BS)
    targets_BS = tokens_BC[:, 1:].contiguous()
    return model(tokens_BS, position_BS, None, labels=targets_BS), _mean


def _mean(losses_BS: Tensor) -> tuple[Tensor, Tensor]:
    loss = losses_BS.mean()
    return loss, loss.detach().clone()
