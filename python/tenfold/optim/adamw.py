# SPDX-License-Identifier: Apache-2.0
"""AdamW that trains parameters whole, in part (masks) or not at all; a drop-in for torch.optim.AdamW.

One kernel call per device and kind of mask does a step for all tensors: loss scale, clipping, weight
decay, moments and update in one pass over memory. What is frozen is not read, not decayed and not
counted in the gradient norm, and has no state.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from tenfold.optim.active import MISMATCH, ActivePlan, active_plan, check_states
from tenfold.optim.calls import Call, Settled, Slot
from tenfold.optim.closure import evaluated
from tenfold.optim.masks import Mask, collect_masks, local
from tenfold.optim.states import DTYPES, MOMENTS, Layout
from tenfold.optim.sums import global_norm

# Keys of torch.optim.AdamW's groups that mean nothing here, so that its checkpoints fit both ways.
_TORCH_KEYS = {"foreach": None, "capturable": False, "differentiable": False,
               "decoupled_weight_decay": True}  # fmt: skip
SCOPES = ("all", "param_only")


def _check(lr: Any, betas: Any, eps: float, weight_decay: float) -> None:
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError("Tensor lr must be 1-element")
    if not lr >= 0.0:
        raise ValueError(f"Invalid learning rate: {lr}")
    if not eps >= 0.0:
        raise ValueError(f"Invalid epsilon value: {eps}")
    for i in (0, 1):
        if not 0.0 <= betas[i] < 1.0:
            raise ValueError(f"Invalid beta parameter at index {i}: {betas[i]}")
    if not weight_decay >= 0.0:
        raise ValueError(f"Invalid weight_decay value: {weight_decay}")


class MaskedAdamW(Optimizer):
    """AdamW (Loshchilov and Hutter) with masks, narrow states and fused clipping.

    Without masks it computes what ``torch.optim.AdamW(fused=True)`` does, bit by bit in float32.

    Args:
        params: as for any optimiser; named parameters and groups too.
        lr, betas, eps, weight_decay, amsgrad, maximize: as in torch. lr may be a 0-d tensor.
        masks: what trains: a mapping from parameters, or a list in their order. A mask is bool (True trains)
            or packed by ``ops.pack_mask``, over ``mask_kind``'s units; a pair (mask, kind) has its own kind.
            None: those of the Plan in force (``hft.apply``), if there is one.
        mask_kind: ``"element"``, ``"row"`` (of the parameter seen as [numel / last, last]), ``"col"`` (last
            dimension) or ``"block"`` (``block_size`` elements in storage order); or a mapping to these.
        mask_scope: ``"all"``, or ``"param_only"``: moments of frozen elements go on, too.
        compact: states hold trained elements only (not with ``param_only`` or 8-bit states).
        state_dtype: ``"param"`` (as torch), ``"fp32"`` (recommended for bf16 parameters), ``"bf16"``, or
            ``"int8"``: 8-bit codes in blocks of 256, for tensors of 4,096 elements and more.
        stochastic_rounding: bf16 parameters are rounded up or down at random, right on average, from
            ``seed``. fp32 parameters: no effect (a warning); fp16: ValueError.
        max_grad_norm: clips to this norm over all trained elements, before the step, without a copy of
            the gradients or a synchronisation; ``last_grad_norm`` is the norm before clipping.
        offload: states of parameters on an accelerator live on the CPU, and the update runs there.
        fused, foreach, capturable: taken for torch's sake; there is one implementation.

    Raises:
        ValueError: a hyper-parameter, or a mask that does not fit. RuntimeError, at a step: sparse or
        complex gradients, a gradient of another dtype, or a Plan that is not this optimiser's.
    """

    # GradScaler hands its scale and what it found over, instead of dividing first.
    _step_supports_amp_scaling = True

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        masks: Any = None,
        mask_kind: Any = "element",
        mask_scope: str = "all",
        block_size: int = 256,
        compact: bool = True,
        state_dtype: str = "param",
        stochastic_rounding: bool = False,
        seed: int = 0,
        max_grad_norm: float | None = None,
        offload: bool = False,
        maximize: bool = False,
        fused: bool | None = None,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
    ) -> None:
        _check(lr, betas, eps, weight_decay)
        if state_dtype not in DTYPES:
            raise ValueError(f"state_dtype must be one of {', '.join(DTYPES)}, got {state_dtype!r}")
        if mask_scope not in SCOPES:
            raise ValueError(f"mask_scope must be one of {', '.join(SCOPES)}, got {mask_scope!r}")
        if amsgrad and state_dtype == "int8":
            raise ValueError("amsgrad needs states in a float dtype, got state_dtype='int8'")
        if max_grad_norm is not None and not max_grad_norm > 0:
            raise ValueError(f"max_grad_norm must be a positive number, got {max_grad_norm}")
        if differentiable:
            raise ValueError("MaskedAdamW is not differentiable")
        defaults = {
            "lr": lr, "betas": tuple(map(float, betas)), "eps": eps, "weight_decay": weight_decay,
            "amsgrad": amsgrad, "maximize": maximize, "fused": fused,
        }  # fmt: skip
        defaults |= _TORCH_KEYS | {"foreach": foreach, "capturable": capturable}
        defaults |= {"state_dtype": state_dtype, "stochastic_rounding": stochastic_rounding}
        self._seed, self._scope, self._block, self._offload = seed, mask_scope, block_size, offload
        self._compact = compact and mask_scope == "all"
        self._max_norm = max_grad_norm
        self._masks: dict[Tensor, Mask] = {}
        self._slots: dict[int, Slot] = {}
        self._made: dict[Any, Call] = {}
        self._settled: Settled | None = None
        self._prefixes: dict[Tensor, Tensor] = {}
        self._expected: dict[int, bool] | None = None
        self._digest = ""
        self.last_grad_norm: Tensor | None = None
        super().__init__(params, defaults)
        active = active_plan(self._parameters())
        if masks is None and active is not None:
            self._set_masks(self._masks_of(active))
        else:
            self._set_masks(collect_masks(masks, mask_kind, block_size, self._parameters()))
        self._bind()

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch; warns of and refuses stochastic rounding where it cannot be."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        _check(group["lr"], group["betas"], group["eps"], group["weight_decay"])
        if group["stochastic_rounding"]:
            found = {p.dtype for p in group["params"]}
            if torch.float16 in found:
                self.param_groups.pop()
                raise ValueError("stochastic_rounding is for bf16 parameters, got float16")
            if torch.float32 in found:
                warnings.warn(
                    "stochastic_rounding does nothing for float32 parameters", stacklevel=3
                )
        if self._expected is not None:
            self._bind()

    def _set_masks(self, masks: dict[Tensor, Mask]) -> None:
        self._masks = masks
        self._slots, self._made, self._settled = {}, {}, None  # they hold states
        kept = masks.items() if self._compact else ()
        self._prefixes = {p: Layout.prefix(m) for p, m in kept}

    # A Plan in force (tenfold.hft.apply): remember it, and see at every step that it still is.

    def _masks_of(self, active: ActivePlan) -> dict[Tensor, Mask]:
        named, mine = active.parameters(), {id(p) for p in self._parameters()}
        return {
            named[n]: Mask(part.mask(named[n]), part.kind, self._block).shard(named[n])
            for n, part in active.plan.partial.items()
            if id(named[n]) in mine
        }

    def _bind(self) -> None:
        active = active_plan(self._parameters())
        self._digest = active.digest if active else ""
        self._expected = {id(p): p.requires_grad for p in self._parameters()}

    def _check_plan(self) -> None:
        parameters = self._parameters()
        active = active_plan(parameters)
        if active is None and not self._digest:
            return
        now = {id(p): p.requires_grad for p in parameters}
        if (active.digest if active else "") != self._digest or now != self._expected:
            raise RuntimeError(
                f"{MISMATCH}: a Plan was applied, or parameters were frozen, after it was built. Call "
                "optimizer.switch(plan), or build a new optimizer"
            )

    def switch(self, plan: Any, states: str = "drop") -> int:
        """Goes over to another Plan, which is in force already (``hft.apply``).

        Groups keep their settings, so learning rate schedules go on; tensors that begin to train and are
        in no group join the first group with tensors of as many dimensions.

        Args:
            plan: the Plan. states: ``"drop"`` starts anew, ``"hand_over"`` keeps the states of what
                trains before and after, ``"keep"`` those of frozen tensors, too.

        Returns:
            Bytes of state freed.

        Raises:
            RuntimeError: the Plan is not in force, or no group takes a tensor.
        """
        check_states(states)
        active = active_plan(self._parameters())
        if active is None or active.digest != plan.digest():
            raise RuntimeError(f"{MISMATCH}: apply the Plan to the model before switching to it")
        named = active.parameters()
        self._join(named, plan)
        before = self._state_bytes()
        layouts = {p: self._layout(p) for p in self._parameters() if self.state.get(p)}
        old = self._masks
        self._set_masks(self._masks_of(active))
        for p in self._parameters():
            if not p.requires_grad:
                p.grad = None
            state = self.state.get(p)
            if state is None or not len(state):
                continue
            if states == "drop" or (states == "hand_over" and not p.requires_grad):
                del self.state[p]
            elif old.get(p) is not self._masks.get(p) and p.requires_grad:
                kept = self._layout(p)
                # A checkpoint may have been loaded before its Plan was applied.
                if layouts[p].fits(state) or not kept.fits(state):
                    dense = layouts[p].dense(state)
                    self.state[p] = kept.store(dense, state["step"], state["step"].device)
        self._bind()
        return before - self._state_bytes()

    def _join(self, named: dict[str, Any], plan: Any) -> None:
        held = {id(p) for p in self._parameters()}
        for name in plan.trainable:
            parameter = named[name]
            if id(parameter) in held:
                continue
            group = next((g for g in self.param_groups
                          if any(p.ndim == parameter.ndim for p in g["params"])), None)  # fmt: skip
            if group is None:
                raise RuntimeError(
                    f"{MISMATCH}: {name} trains, and no parameter group holds tensors of "
                    f"{parameter.ndim} dimensions; build the optimizer over all parameters"
                )
            group["params"].append(parameter)
            if "param_names" in group:
                group["param_names"].append(name)

    def _state_bytes(self) -> int:
        return sum(local(t).nbytes for s in self.state.values() for t in s.values()
                   if isinstance(t, Tensor))  # fmt: skip

    def _layout(self, parameter: Tensor) -> Layout:
        group = next(g for g in self.param_groups if any(p is parameter for p in g["params"]))
        return self._layout_in(group, parameter)

    def _layout_in(self, group: dict[str, Any], parameter: Tensor) -> Layout:
        mask = self._masks.get(parameter)
        return Layout(parameter, group["state_dtype"], mask, self._compact)

    # The step.

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step; ``closure`` evaluates the model again, with gradients."""
        loss = evaluated(closure)
        self._check_plan()
        scale, found = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        calls = self._calls()
        try:
            clip = self._clip(calls, scale) if self._max_norm is not None and calls else None
            for call in calls:
                call.run(scale, found, clip, self._seed, self._scope, self._block)
        finally:
            for call in calls:  # gradients and copies must not live on
                if self._settled is None:
                    call.clear()
                else:
                    call.grads.clear()
        return loss

    def _calls(self) -> list[Call]:
        params = self._parameters()
        grads = [p.grad for p in params]
        if self._settled is not None:
            if self._settled.repeat(self.param_groups, self.state, params, grads):
                return self._settled.calls
            for call in self._settled.calls:
                call.clear()
            self._settled = None
        calls = self._sort(grads)
        if Settled.can_be(calls, self._slots):
            self._settled = Settled(self.param_groups, self.state, params, grads, calls)
        return calls

    def _sort(self, grads: list[Tensor | None]) -> list[Call]:
        numbers = itertools.count()
        used: dict[int, Call] = {}
        for at, group in enumerate(self.param_groups):
            for p in group["params"]:
                number = next(numbers)
                grad = grads[number]
                if grad is None:
                    continue
                if grad.layout is not torch.strided:
                    raise RuntimeError("MaskedAdamW does not support sparse gradients")
                slot = self._slots.get(number)
                if slot is None or not self._is_current(slot, group, p):
                    if grad.is_complex():
                        raise RuntimeError("MaskedAdamW does not support complex gradients")
                    slot = self._slots[number] = self._slot(at, group, p, number)
                if id(slot.call) not in used:
                    used[id(slot.call)] = slot.call
                    slot.call.clear()
                slot.call.add(slot, grad)
        return list(used.values())

    # Parameters, groups, masks and states can be changed from outside between two steps.

    def _is_current(self, slot: Slot, group: dict[str, Any], p: Tensor) -> bool:
        return (
            slot.param is p and slot.call.group is group
            and self.state.get(p) is slot.state and slot.mask is self._masks.get(p)
            and "step" in slot.state and slot.state["step"].device == slot.device
            and ("absmax1" in slot.state) == slot.call.coded
        )  # fmt: skip

    def _slot(self, at: int, group: dict[str, Any], p: Tensor, number: int) -> Slot:
        state = self.state[p]
        if len(state) == 0:
            device = torch.device("cpu") if self._offload else local(p).device
            state.update(self._layout_in(group, p).zeros(device, group["amsgrad"]))
        mask = self._masks.get(p)
        coded = "absmax1" in state
        kind = mask.kind if mask else "none"
        spread = (p.device_mesh, p.placements) if hasattr(p, "placements") else None
        key = (at, state["step"].device, coded, kind, spread)
        call = self._made.get(key)
        if call is None or call.group is not group:
            call = self._made[key] = Call(group, kind, coded, sharded=p if spread else None)
        return Slot.make(p, state, mask, self._prefixes.get(p), number, call)

    def _clip(self, calls: list[Call], scale: Tensor | None) -> Tensor:
        pieces = ((c.kind, c.grads, c.masks, c.sharded) for c in calls)
        norm = global_norm(pieces, self._block, scale)
        self.last_grad_norm = norm
        # torch.nn.utils.clip_grad_norm_'s formula
        return torch.clamp(self._max_norm / (norm + 1e-6), max=1.0)  # type: ignore[operator]

    # Checkpoints.

    def __getstate__(self) -> dict[str, Any]:
        kept = (
            "_seed",
            "_scope",
            "_block",
            "_offload",
            "_compact",
            "_max_norm",
            "_masks",
            "_prefixes",
        )
        return super().__getstate__() | {k: getattr(self, k) for k in kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._slots, self._made, self._settled = {}, {}, None
        if "_masks" in state:  # a copy, or unpickled; else part of load_state_dict
            self.last_grad_norm = None
            self._bind()
        for group in self.param_groups:
            for key, value in {
                "amsgrad": False,
                "maximize": False,
                "fused": None,
                **_TORCH_KEYS,
            }.items():
                group.setdefault(key, value)

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes its own state dicts and those of ``torch.optim.AdamW``.

        Moments are brought into the form and dtype of this optimiser (torch would cast all to the
        parameters' dtype). ValueError if they do not fit.
        """
        own = [{k: g[k] for k in ("state_dtype", "stochastic_rounding")} for g in self.param_groups]
        super().load_state_dict(state_dict)
        for group, kept in zip(self.param_groups, own):
            group.update(kept)
        saved = [i for g in state_dict["param_groups"] for i in g["params"]]
        for index, (group, p) in zip(saved, self._with_groups()):
            given = state_dict["state"].get(index)
            if given is None or not len(given):
                continue
            self.state[p] = self._loaded(group, p, given)

    def _with_groups(self) -> list[tuple[dict[str, Any], Tensor]]:
        return [(g, p) for g in self.param_groups for p in g["params"]]

    def _loaded(self, group: dict[str, Any], p: Tensor, given: dict[str, Any]) -> dict[str, Any]:
        layout = self._layout_in(group, p)
        device = torch.device("cpu") if self._offload else local(p).device
        step = torch.as_tensor(given["step"], dtype=torch.float32)
        state = {k: v.to(device).clone() if isinstance(v, Tensor) else v for k, v in given.items()}
        state["step"] = step.to(device).clone().reshape(())
        if layout.fits(state):
            return state
        here = local(p)
        if layout.mask is None and local(state["exp_avg"]).numel() < here.numel():
            return state  # compact states whose masks a Plan will bring (switch)
        for choice, mask in itertools.product(
            (group["state_dtype"], "int8", "fp32"), (None, layout.mask)
        ):
            other = Layout(p, choice, mask, mask is not None)
            if (
                other.coded == ("absmax1" in state)
                and local(state["exp_avg"]).numel() == other.numel
            ):
                return layout.store(other.dense(state), state["step"], device)
        raise ValueError(
            f"states of {local(state['exp_avg']).numel()} elements fit neither a parameter "
            f"{list(here.shape)} nor its {layout.numel} trained elements"
        )

    def dense_state_dict(self) -> dict[str, Any]:
        """A state dict as ``torch.optim.AdamW`` writes it: float moments of the parameters' shapes.

        Frozen elements of compact states come out as 0, 8-bit codes as the float32 they stand for.
        """
        made = self.state_dict()
        saved = [i for g in made["param_groups"] for i in g["params"]]
        for index, (group, p) in zip(saved, self._with_groups()):
            state = self.state.get(p)
            if state:
                dense = self._layout_in(group, p).dense(state)
                made["state"][index] = {"step": state["step"].clone()} | {
                    n: dense[n] for n in MOMENTS if n in dense
                }
        return made
