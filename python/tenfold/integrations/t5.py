# SPDX-License-Identifier: Apache-2.0
"""T5, mT5 and UMT5 on tenfold's ops, in one call.

    from tenfold.integrations import t5
    t5.patch(model)              # or: with t5.patch(model): ...
    t5.unpatch(model)

Self- and cross-attention run through ``t5_attention`` (no bias and no mask in memory, dropout by Philox), norms through
``rms_norm``, gated feed-forwards through ``gated_gelu`` or ``swiglu``, and the loss of ``labels`` through
``linear_cross_entropy`` (no logits in memory). Parameters, their names, hooks, checkpoints and generation stay as they
are. The relu feed-forward of T5 1.0, models in float64, masks that are not prefixes, static caches in self-attention
and calls that want attention probabilities run through transformers' own code.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import nn

from tenfold.integrations import transformers as hf
from tenfold.integrations._hosts import check_signature

hf.require(
    "tenfold.integrations.t5", 5, 20
)  # the bias was no argument of attention functions before

from tenfold.integrations import _t5_modules as modules  # noqa: E402

FAMILIES = {"t5": "T5", "mt5": "MT5", "umt5": "UMT5"}
LOGITS = ("auto", "always", "never")
PADDING = ("check", "right")
_PARTS = {
    "attention": ("Attention",),
    "norm": ("LayerNorm",),
    "feed_forward": ("DenseGatedActDense",),
    "loss": ("ForConditionalGeneration",),
}
_MIXINS = {
    "Attention": modules.Attention,
    "LayerNorm": modules.Norm,
    "DenseGatedActDense": modules.GatedFeedForward,
    "ForConditionalGeneration": modules.ConditionalGeneration,
}
_SIGNATURES = {
    "t5": (
        "self",
        "hidden_states",
        "mask",
        "key_value_states",
        "position_bias",
        modules.CACHE,
        "kwargs",
    ),
    "umt5": (
        "self",
        "hidden_states",
        "encoder_hidden_states",
        modules.CACHE,
        "attention_mask",
        "kwargs",
    ),
}


def _classes() -> dict[type, type]:
    """transformers' classes and ours; ours have their names, which are what is saved with a model."""
    found: dict[type, type] = {}
    for family, prefix in FAMILIES.items():
        home = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
        for suffix, mixin in _MIXINS.items():
            stock = getattr(home, prefix + suffix)
            if suffix == "Attention":
                expected = _SIGNATURES.get(family, _SIGNATURES["t5"])
                check_signature("transformers", stock.forward, expected)
                mixin = modules.PerLayerAttention if family == "umt5" else mixin
            name = f"Tenfold{prefix}{suffix}"
            about = {"__module__": __name__, "__qualname__": name, "tenfold_stock": stock}
            found[stock] = globals()[name] = type(stock.__name__, (mixin, stock), about)
    return found


_OURS = _classes()
_NAMES = ", ".join(
    f"{p}{s}"
    for p in FAMILIES.values()
    for s in ("Model", "EncoderModel", "ForConditionalGeneration")
)


class Patched:
    """A model on our ops; ``remove()``, or leaving ``with``, puts everything back as it was.

    Attributes:
        replaced: names of the modules that run through tenfold, by what they are.
    """

    def __init__(self, model: nn.Module, replaced: dict[str, list[str]]) -> None:
        self.replaced, self._model = replaced, model
        self._configs: list[tuple[Any, Any]] = []

    def remove(self) -> None:
        """Puts transformers' own classes and attention back; a second call does nothing."""
        for module in self._model.modules():
            stock = getattr(type(module), "tenfold_stock", None)
            if stock is not None and type(module) is _OURS.get(stock):
                module.__class__ = stock
                for name in ("tenfold_act", "tenfold_logits"):
                    module.__dict__.pop(name, None)
        for config, before in self._configs:
            config._attn_implementation_internal = before
        self._configs = []
        self._model.__dict__.pop("_tenfold_t5", None)

    def __enter__(self) -> Patched:
        return self

    def __exit__(self, *exc: object) -> None:
        self.remove()


def patch(
    model: nn.Module,
    *,
    attention: bool = True,
    norm: bool = True,
    feed_forward: bool = True,
    loss: bool = True,
    logits: str = "auto",
    padding: str = "check",
) -> Patched:
    """Runs a T5, mT5 or UMT5 model, or those inside a larger model, through tenfold's ops, in place.

    Call it before ``torch.compile``, ``accelerate``'s ``prepare`` and FSDP. Outputs agree within rounding; the bits
    of dropout are Philox's, seeded from torch's generator (each draw of a seed breaks a compiled graph).

    Args:
        model: any model with transformers' T5, mT5 or UMT5 modules.
        attention, norm, feed_forward, loss: what is replaced.
        logits: with ``labels`` the loss needs none. ``"auto"``: ``logits`` is None while the model is in training mode,
            and computed in evaluation mode (as ``Trainer`` wants); ``"always"``; ``"never"``.
        padding: ``"check"``: each mask is looked at once per forward (a synchronisation on a GPU), and one that is not
            a prefix of ones runs through transformers' attention, with a warning; ``"right"`` promises that it is,
            which needs no look and can be compiled.

    With ``num_items_in_batch`` (``Trainer`` passes it) the loss is the sum over labels divided by it, so that gradient
    accumulation gives the gradient of one large batch; transformers' own classes ignore it. A row without any key has
    attention 0.

    Returns:
        A handle; also a context manager.

    Raises:
        TypeError: no such module in the model, or a forward that another tool has replaced (named).
        ValueError: options. RuntimeError: patched already, or compiled.
        ImportError: a version of transformers whose modules are other ones.
    """
    if logits not in LOGITS:
        raise ValueError(f"logits must be one of {', '.join(LOGITS)}, got {logits!r}")
    if padding not in PADDING:
        raise ValueError(f"padding must be one of {', '.join(PADDING)}, got {padding!r}")
    if isinstance(model, torch._dynamo.OptimizedModule):
        raise RuntimeError(
            "patch(model) takes the model before torch.compile; compile the patched one"
        )
    chosen = {"attention": attention, "norm": norm, "feed_forward": feed_forward, "loss": loss}
    found = _find(model, chosen)
    modules.register()
    handle = Patched(model, {part: [n for n, _ in of] for part, of in found.items()})
    for of in found.values():
        for _, module in of:
            if type(module).__name__.endswith("DenseGatedActDense"):
                module.tenfold_act = _activation(module)
            if hasattr(module, "lm_head"):
                module.tenfold_logits = logits
            module.__class__ = _OURS[type(module)]
    if found["attention"]:
        name = modules.NAME if padding == "check" else modules.RIGHT
        configs = {id(m.config): m.config for _, m in found["attention"]}
        for config in configs.values():
            handle._configs.append((config, config._attn_implementation_internal))
            config._attn_implementation_internal = name
    model.__dict__["_tenfold_t5"] = handle
    return handle


def unpatch(model: nn.Module) -> None:
    """Undoes :func:`patch`. Raises RuntimeError for a model that is not patched."""
    handle = model.__dict__.get("_tenfold_t5")
    if handle is None:
        raise RuntimeError(
            f"this {type(model).__name__} is not patched (a module inside it may be)"
        )
    handle.remove()


def _activation(module: Any) -> str | None:
    """The name of a gated feed-forward's activation where we have it, else None."""
    from transformers.activations import ACT2FN

    for name in (*modules.GELUS, "silu"):
        like = ACT2FN[name]
        if type(module.act) is type(like) and getattr(module.act, "use_gelu_python", 0) == getattr(
            like, "use_gelu_python", 0
        ):
            return name
    return None


def _find(model: nn.Module, chosen: dict[str, bool]) -> dict[str, list[tuple[str, Any]]]:
    found: dict[str, list[tuple[str, Any]]] = {part: [] for part in _PARTS}
    known = False
    for name, module in model.named_modules():
        kind = type(module)
        if hasattr(kind, "tenfold_stock"):
            raise RuntimeError(
                f"{name or type(model).__name__} is patched already; unpatch(model) first"
            )
        if kind not in _OURS:
            continue
        known = True
        part = next(p for p, ends in _PARTS.items() if kind.__name__.endswith(ends))
        if not chosen[part] or (part == "feed_forward" and _activation(module) is None):
            continue
        if "forward" in module.__dict__:
            raise TypeError(
                f"the forward of {name or type(model).__name__} has been replaced by another tool; call patch(model) "
                "before it (accelerate's hooks and prepare(), for example)"
            )
        found[part].append((name, module))
    if not known:
        raise TypeError(
            f"{type(model).__name__} has no module of transformers' T5, mT5 or UMT5; supported: models with them, as "
            f"{_NAMES}"
        )
    return found
