# SPDX-License-Identifier: Apache-2.0
"""``experts_implementation="tenfold"``: our expert block in transformers' mixtures (Mixtral, Qwen-MoE, OLMoE ...).

    from tenfold.integrations import experts
    experts.register()  # nothing else is changed
    model = AutoModelForCausalLM.from_pretrained(name, experts_implementation="tenfold")
    model.set_experts_implementation("tenfold")  # or later

Every model whose experts use transformers' interface with SwiGLU weights ``gate_up_proj`` [n, 2 f, d] and
``down_proj`` [n, d, f] runs through ``moe_swiglu_mlp``, forward, backward and generation; what else there is (other
activations, biases, transposed or interleaved weights, norms after experts) is refused by name, at the first forward or
by :func:`replace_moe`. Importing this module raises ImportError where transformers' interface is not the known one.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN

from tenfold import ops
from tenfold.integrations import transformers as hf
from tenfold.integrations._hosts import Patched, refuse_patched, undo_patch

hf.require("tenfold.integrations.experts", 5, 18)  # older ones take their own names only

NAME = "tenfold"
# What the experts of transformers' decorator may be, as far as is known here; ours are the values named.
_OPTIONS = {"is_concatenated": True, "is_transposed": False, "has_bias": False, "has_gate": True,
            "has_post_expert_norm": False}  # fmt: skip
_KNOWN = {"experts_class", "experts_interface", *_OPTIONS}
_MEANING = {
    "is_concatenated": "interleaved rows of gate and up",
    "is_transposed": "transposed weights [n, d, 2 f]",
    "has_bias": "biases",
    "has_gate": "no gate",
    "has_post_expert_norm": "a norm after each expert",
}


def _moe() -> Any:
    """transformers' module of the interface; ImportError where it is another than the one that is known."""
    import transformers

    try:
        from transformers.integrations import moe

        options = inspect.signature(moe.use_experts_implementation).parameters
        interface = moe.ExpertsInterface, moe.ALL_EXPERTS_FUNCTIONS
    except (ImportError, AttributeError) as error:
        raise ImportError(
            f"transformers {transformers.__version__} has no experts interface as tenfold.integrations.experts "
            f"knows it ({error}); it is tested with 5.24",
            name="transformers",
        ) from error
    unknown = sorted(set(options) - _KNOWN)
    if unknown or not hasattr(interface[0], "register"):
        what = f"kinds of experts ({', '.join(unknown)})" if unknown else "an interface"
        raise ImportError(
            f"transformers {transformers.__version__} has {what} that tenfold.integrations.experts does not know; "
            "it is tested with 5.24. Upgrade tenfold, or install an older transformers",
            name="transformers",
        )
    return moe


_host = _moe()
_GATE = getattr(_host, "_default_apply_gate", None)
_SILU = (type(ACT2FN["silu"]), nn.SiLU)


def refusal(experts: nn.Module) -> str | None:
    """Why the experts of a module cannot run here, in words; None if they can."""
    for name, ours in _OPTIONS.items():
        if bool(getattr(experts, name, ours)) != ours:
            return _MEANING[name]
    if _GATE is not None and getattr(type(experts), "_apply_gate", _GATE) is not _GATE:
        return "a gate of its own (_apply_gate)"
    activation = getattr(experts, "act_fn", None)
    if activation is not F.silu and not isinstance(activation, _SILU):
        return f"the activation {getattr(activation, '__name__', type(activation).__name__)}"
    up, down = (getattr(experts, name, None) for name in ("gate_up_proj", "down_proj"))
    if up is None or down is None:
        return "no gate_up_proj or no down_proj"
    n, out, f = down.shape if down.dim() == 3 else (0, 0, 0)
    if up.shape != (n, 2 * f, out):
        return f"weights {list(up.shape)} and {list(down.shape)}"
    return None


_SUPPORTED = (
    "supported: SwiGLU experts with weights gate_up_proj [n, 2 f, d] and down_proj [n, d, f]"
)


def _check(experts: nn.Module, name: str = "") -> None:
    found = refusal(experts)
    if found is not None:
        where = f"{name} ({type(experts).__name__})" if name else type(experts).__name__
        raise TypeError(
            f"experts_implementation='tenfold' cannot run {where}: it has {found}; {_SUPPORTED}. "
            "Use model.set_experts_implementation('eager')"
        )


def fused_moe(
    x: Tensor, gate_up_proj: Tensor, down_proj: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """``moe_swiglu_mlp`` in the call shape of Liger's fused MoE; an index of n or above names nobody."""
    return ops.moe_swiglu_mlp(x, gate_up_proj, down_proj, top_k_index, top_k_weights,
                              allow_sentinel=True)  # fmt: skip


def experts_forward(
    self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """The experts of a block: hidden_states [T, d], top_k_index and top_k_weights [T, k] -> [T, d].

    Raises:
        TypeError: the module has what is not supported.
    """
    _check(self)
    return fused_moe(hidden_states, self.gate_up_proj, self.down_proj, top_k_index, top_k_weights)


def register() -> None:
    """Makes ``experts_implementation="tenfold"`` known to transformers; a second call does nothing.

    Raises:
        RuntimeError: somebody else has registered another function under that name.
    """
    found = _host.ALL_EXPERTS_FUNCTIONS.get(NAME)
    if found not in (None, experts_forward):
        raise RuntimeError(
            f"an experts implementation {NAME!r} is registered already ({found.__module__}."
            f"{found.__qualname__}); remove it first"
        )
    _host.ExpertsInterface.register(NAME, experts_forward)


def unregister() -> None:
    """Takes it back; models that are set to it must be set to another one. A second call does nothing."""
    mapping = _host.ExpertsInterface._global_mapping
    if mapping.get(NAME) is experts_forward:
        del mapping[NAME]


def experts_of(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of a model whose experts go through transformers' interface, by name."""
    return {name: m for name, m in model.named_modules() if hasattr(m, "is_transposed") and hasattr(m, "down_proj")
            and hasattr(m, "config")}  # fmt: skip


class Replaced(Patched):
    """A model's experts after :func:`replace_moe`; ``remove()``, or leaving ``with``, puts the former ones back.

    Attributes:
        experts: names of the modules that run through tenfold.
    """

    def __init__(self, model: Any, experts: dict[str, nn.Module]) -> None:
        self.experts = list(experts)
        if hasattr(model, "get_experts_implementation"):
            before = model.get_experts_implementation()
        else:
            before = model.config._experts_implementation
        super().__init__(model, "experts", lambda: model.set_experts_implementation(before))
        model.set_experts_implementation(NAME)
        left = [n for n, m in experts.items() if m.config._experts_implementation != NAME]  # type: ignore[union-attr]
        if left:
            self.remove()
            raise TypeError(
                f"{type(model).__name__} does not let its experts implementation be set ({left[0]} stays as it was)"
            )


def replace_moe(model: Any) -> Replaced:
    """Runs all experts of a transformers model through tenfold, or says which of them cannot.

    Registers the implementation if need be. Nothing is changed when it raises.

    Raises:
        TypeError: no experts that use transformers' interface, or some that are not supported (named).
        RuntimeError: patched already, and as :func:`register`.
    """
    if not hasattr(model, "set_experts_implementation"):
        raise TypeError(
            f"replace_moe needs a transformers model with an experts interface, got {type(model).__name__}"
        )
    refuse_patched(model, "experts")
    register()
    found = experts_of(model)
    if not found:
        raise TypeError(
            f"{type(model).__name__} has no experts that go through transformers' experts interface; {_SUPPORTED}"
        )
    for name, experts in found.items():
        _check(experts, name)
    return Replaced(model, found)


patch = replace_moe  # under the name that the other integrations have


def unpatch(model: Any) -> None:
    """Undoes :func:`patch`. Raises RuntimeError for a model that is not patched."""
    undo_patch(model, "experts")
