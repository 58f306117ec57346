"""The same training step with torchtitan 0.3.0's own parts.

Its Qwen3 mixture-of-experts model (without the norms of query and key), its sharding by DTensor and
FSDP2, its pipeline over torch's Schedule1F1B, its gradient clipping, optimizer container and token
dispatcher, put together as its Trainer does, which itself wants a tokenizer and a data loader.
Three things differ from its defaults: attention is PyTorch's fused kernel (its Flex and Varlen
attention need CUDA or a compiler), experts multiply in float32 (it casts to bfloat16 always), and
the sharding is its ``partial_dtensor`` (``spmd_types`` needs a newer FSDP2 than torch 2.13's).
Experts are balanced as it does it, by a bias on the scores that follows the loads; it has no
balance loss.
"""

import functools
from dataclasses import dataclass, fields
from functools import partial
from importlib import import_module
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from benchmarks.steps.model import Model, Split
from benchmarks.steps.weights import whole_weights


class TorchtitanStep:
    """A rank's part of the model, its optimizer and schedule; all ranks of the default group call.

    Raises:
        ImportError: torchtitan, or the triton that it imports, is not installed.
    """

    def __init__(self, model: Model, split: Split) -> None:
        _import()
        from torchtitan.components.loss import CrossEntropyLoss
        from torchtitan.components.optimizer import register_moe_load_balancing_hook
        from torchtitan.distributed import ParallelDims, utils

        self.description, self.split = model, split
        parallelism = _parallelism(split, model.micro_batch)
        self.dims = ParallelDims.from_config(parallelism, split.world)
        utils.set_spmd_backend(parallelism.spmd_backend)
        torch.manual_seed(0)
        self.loss = CrossEntropyLoss.Config(global_vocab_size=model.vocabulary).build()
        self.schedule: Any = None
        self.parts, self.first, self.last = self._parallelize(parallelism)
        for part in self.parts:
            _sum_without_scaling(part)
            part.to_empty(device="cpu")
            with torch.no_grad():
                part.init_weights(buffer_device=None)
            part.train()
            _load(part, whole_weights(model))
        self.optimizers = _optimizers(model, self.parts)
        register_moe_load_balancing_hook(self.optimizers, self.parts, self.dims)
        self.context = utils.get_spmd_context(parallel_dims=self.dims)

    def _parallelize(self, parallelism: Any) -> tuple[list[nn.Module], bool, bool]:
        from torchtitan.config import CompileConfig, TrainingConfig
        from torchtitan.distributed.pipeline_parallel import pipeline_llm
        from torchtitan.models.qwen3 import parallelize_qwen3

        description = self.description
        config = _model_config(description)
        config.update_from_config(config=_Settings(parallelism))
        training = TrainingConfig(
            local_batch_size=description.global_batch // self.split.dp,
            seq_len=description.sequence,
            mixed_precision_param="float32",
            mixed_precision_reduce="float32",
        )
        with torch.device("meta"):
            whole = config.build()
        shared = {
            "parallel_dims": self.dims,
            "training": training,
            "parallelism": parallelism,
            "compile_config": CompileConfig(enable=False),
            "ac_config": None,
            "dump_folder": "",
        }
        if self.split.pp == 1:
            return [parallelize_qwen3(whole, **shared)], True, True
        self.schedule, parts, first, last = pipeline_llm(
            whole,
            **shared,
            device=torch.device("cpu"),
            model_config=config,
            parallelize_fn=parallelize_qwen3,
            loss_fn=self.loss,
        )
        return parts, first, last

    @property
    def parameters(self) -> int:
        """Parameters know their whole shapes; the stages' numbers are added."""
        own = sum(p.numel() for part in self.parts for p in part.parameters())
        whole = torch.tensor(own * self.split.pp / self.split.world, dtype=torch.float64)
        dist.all_reduce(whole)
        return round(whole.item())

    def step(self, tokens_BC: Tensor) -> float | None:
        """As ``torchtitan.trainer.Trainer.train_step``, its report of the loss included."""
        from torchtitan.distributed import utils

        self.optimizers.zero_grad()
        batch = self.dims.get_optional_mesh("batch")
        place = batch.get_local_rank() if batch is not None else 0
        own_BC = tokens_BC.chunk(self.split.dp)[place]
        targets = torch.tensor(own_BC[:, 1:].numel())
        if self.split.dp > 1:
            targets = utils.dist_sum_tensor(targets, batch)
        loss = self._forward_backward(own_BC, targets)
        utils.clip_grad_norm_(
            [p for part in self.parts for p in part.parameters()],
            self.description.clip,
            foreach=True,
            pp_mesh=self.dims.get_optional_mesh("pp"),
            ep_enabled=self.dims.ep_enabled,
        )
        self.optimizers.step()
        if loss is None:
            return None
        mesh = self.dims.get_optional_mesh("loss")
        return loss.item() if mesh is None else float(utils.dist_sum(loss, mesh))

    def _forward_backward(self, own_BC: Tensor, targets: Tensor) -> Tensor | None:
        tokens_BS, labels_BS = own_BC[:, :-1].contiguous(), own_BC[:, 1:].contiguous()
        losses: list[Tensor] = []
        with self.context():
            if self.schedule is not None:
                self.schedule.step(
                    *((tokens_BS,) if self.first else ()),
                    target=labels_BS if self.last else None,
                    losses=losses if self.last else None,
                    loss_kwargs={"global_valid_tokens": targets},
                    return_outputs=False,
                )
            else:
                count = self.split.micro_batches(self.description)
                for tokens, labels in zip(
                    tokens_BS.chunk(count), labels_BS.chunk(count), strict=True
                ):
                    loss, _ = self.loss(self.parts[0](tokens), labels, targets)
                    loss.backward()
                    losses.append(loss)
        return torch.stack([loss.detach() for loss in losses]).sum() if losses else None


@functools.cache
def _import() -> None:
    """Import torchtitan for the CPU: it looks once, on import, for an accelerator."""
    before = torch._utils._get_available_device_type
    torch._utils._get_available_device_type = lambda: "cpu"
    try:
        import_module("torchtitan.models.qwen3")
    finally:
        torch._utils._get_available_device_type = before


@dataclass
class _Settings:
    """The part of torchtitan's run config that its model reads."""

    parallelism: Any


def _parallelism(split: Split, micro_batch: int) -> Any:
    from torchtitan.config import ParallelismConfig

    return ParallelismConfig(
        data_parallel_shard_degree=split.dp,
        fsdp_reshard_after_forward="never",  # as ours and megatron-core, which keep weights whole
        tensor_parallel_degree=split.tp,
        pipeline_parallel_degree=split.pp,
        pipeline_parallel_schedule="1F1B",
        pipeline_parallel_microbatch_size=micro_batch,
        pipeline_parallel_first_stage_less_layers=0,
        pipeline_parallel_last_stage_less_layers=0,
        expert_parallel_degree=split.ep,
        spmd_backend="partial_dtensor",
    )


def _model_config(model: Model) -> Any:
    from torchtitan.models.common import CosSinRoPE, Embedding, Linear
    from torchtitan.models.common.attention import ScaledDotProductAttention
    from torchtitan.models.common.config_utils import (
        make_gqa_config,
        make_moe_config,
        make_routed_experts_config,
        make_router_config,
    )
    from torchtitan.models.common.nn_modules import RMSNorm
    from torchtitan.models.qwen3 import Qwen3Model, Qwen3TransformerBlock

    drawn = {"weight": partial(nn.init.normal_, std=0.02)}
    head_width = model.width // model.heads

    def norm() -> Any:
        return RMSNorm.Config(
            normalized_shape=model.width,
            eps=model.norm_eps,
            param_init={"weight": nn.init.ones_},
        )

    def block() -> Any:
        experts = make_routed_experts_config(
            dim=model.width,
            hidden_dim=model.hidden,
            num_experts=model.experts,
            top_k=model.k,
            param_init=dict.fromkeys(("w1_EFD", "w2_EDF", "w3_EFD"), drawn["weight"]),
            comm_backend="standard",
        )
        experts.inner_experts = _float32_experts().Config(
            **{
                f.name: getattr(experts.inner_experts, f.name)
                for f in fields(experts.inner_experts)
            }
        )
        return Qwen3TransformerBlock.Config(
            attention_norm=norm(),
            ffn_norm=norm(),
            attention=make_gqa_config(
                dim=model.width,
                n_heads=model.heads,
                n_kv_heads=model.heads,
                head_dim=head_width,
                wqkv_param_init=drawn,
                wo_param_init=drawn,
                inner_attention=ScaledDotProductAttention.Config(),
                rope=CosSinRoPE.Config(
                    dim=head_width, max_seq_len=model.sequence, theta=model.rope_theta
                ),
            ),
            moe=make_moe_config(
                num_experts=model.experts,
                router=make_router_config(
                    dim=model.width,
                    num_experts=model.experts,
                    gate_param_init=drawn,
                    top_k=model.k,
                    score_func="softmax",
                    route_norm=True,
                ),
                routed_experts=experts,
            ),
        )

    return Qwen3Model.Config(
        dim=model.width,
        vocab_size=model.vocabulary,
        norm=norm(),
        tok_embeddings=Embedding.Config(
            num_embeddings=model.vocabulary, embedding_dim=model.width, param_init=drawn
        ),
        lm_head=Linear.Config(
            in_features=model.width, out_features=model.vocabulary, param_init=drawn
        ),
        layers=[block() for _ in range(model.layers)],
    )


@functools.cache
def _float32_experts() -> Any:
    """torchtitan's experts without their casts to bfloat16."""
    from torchtitan.models.common.moe import GroupedExperts

    class Float32Experts(GroupedExperts):  # type: ignore[misc]
        @dataclass(kw_only=True, slots=True)
        class Config(GroupedExperts.Config):  # type: ignore[misc]
            pass

        def forward(self, x_RD: Tensor, num_tokens_per_expert_E: Tensor) -> Tensor:
            weights = (self.w1_EFD, self.w2_EDF, self.w3_EFD)
            w1_EFD, w2_EDF, w3_EFD = (
                w.to_local() if isinstance(w, DTensor) else w for w in weights
            )
            offsets_E = num_tokens_per_expert_E.cumsum(0, dtype=torch.int32)
            gate_RF = self._grouped_mm(A=x_RD, B_t=w1_EFD.mT, offs=offsets_E)
            up_RF = self._grouped_mm(A=x_RD, B_t=w3_EFD.mT, offs=offsets_E)
            return self._grouped_mm(A=F.silu(gate_RF) * up_RF, B_t=w2_EDF.mT, offs=offsets_E)

    return Float32Experts


_NAMES = {
    "embedding": "tok_embeddings",
    "head": "lm_head",
    "blocks.": "layers.",
    "attention.q.": "attention.qkv_linear.wq.",
    "attention.k.": "attention.qkv_linear.wk.",
    "attention.v.": "attention.qkv_linear.wv.",
    "attention.out.": "attention.wo.",
    "feed_forward_norm": "ffn_norm",
    "moe.router.": "moe.router.gate.",
}


def _load(part: nn.Module, weights: dict[str, Tensor]) -> None:
    """Fill this rank's part of the model from our whole weights."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    named: dict[str, Tensor] = {}
    for name, whole in weights.items():
        for ours, theirs in _NAMES.items():
            name = name.replace(ours, theirs)
        experts = name.replace("moe.experts.", "moe.routed_experts.inner_experts.")
        if name.endswith("w_in_EPFD"):
            gate_EFD, up_EFD = whole.unbind(1)
            named[experts.replace("w_in_EPFD", "w1_EFD")] = gate_EFD.contiguous()
            named[experts.replace("w_in_EPFD", "w3_EFD")] = up_EFD.contiguous()
        elif name.endswith("w_out_EFD"):
            named[experts.replace("w_out_EFD", "w2_EDF")] = whole.mT.contiguous()
        else:
            named[name] = whole
    # in the same order on every rank: each tensor is handed out by a collective
    here = {name: named[name] for name, _ in part.named_parameters()}
    options = StateDictOptions(full_state_dict=True, strict=False)
    set_model_state_dict(part, here, options=options)


def _sum_without_scaling(part: nn.Module) -> None:
    """gloo cannot scale while it sums, which FSDP2 asks for even where the scale is one."""
    for module in part.modules():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)


def _optimizers(model: Model, parts: list[nn.Module]) -> Any:
    from torchtitan.components.optimizer import OptimizersContainer, ParamGroupConfig

    def group(pattern: str, weight_decay: float) -> Any:
        values = {"lr": model.lr, "betas": model.betas, "eps": model.eps}
        return ParamGroupConfig(
            pattern=pattern,
            optimizer_name="AdamW",
            optimizer_kwargs={**values, "weight_decay": weight_decay},
        )

    config = OptimizersContainer.Config(
        param_groups=[group(r"norm", 0.0), group(r".*", model.weight_decay)]
    )
    return config.build(model_parts=parts)
