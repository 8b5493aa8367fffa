"""Read a joint model's passes, and further texts in the place of the prompt, without any effect on the image.

After every block the same block is called once more, with the hidden state of another text in the place of the
prompt's; what it returns for the text is the text's next hidden state. The image in this second call is the real one,
so the text sees exactly what the prompt sees. The modulation (`temb`) is that of the pass, with the prompt's pooled
text, for the image's keys must stay those of the pass. What a block computes is seen by hooks on the projections of its
attentions, under any processor. An attention is joint if the text reaches it.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, NamedTuple

import torch

from ..batches import Rows
from ..placement import on_device
from ..readers.sites import refuse_caches
from ..watch import alone, see_input, see_output, who_is_alone
from .families import Family
from .maps import JointAttention

Read = Callable[[JointAttention, tuple[JointAttention, ...]], None]

BATCHED = (  # arguments of a pass or a block with a row for each image
    "hidden_states",
    "encoder_hidden_states",
    "encoder_hidden_states_mask",
    "pooled_projections",
    "timestep",
    "guidance",
    "temb",
)


class Pass(NamedTuple):
    """A pass that is read; see `Stream.begin`."""

    arguments: Mapping[str, Any]
    rows: Rows
    texts: Sequence[torch.Tensor]
    read: Read
    strict: bool


class Stream:
    """The hooks that read a denoiser's blocks and call each again with further texts; a context manager.

    Raises ValueError for a denoiser that cannot be read: fused projections, or a cache that skips blocks.
    """

    def __init__(self, family: Family, denoiser: Any):
        check_readable(denoiser)
        self._family, self._denoiser = family, denoiser
        self._names = {module: name.replace("_orig_mod.", "") for name, module in denoiser.named_modules()}
        self._blocks = [block for name in family.blocks for block in getattr(denoiser, name)]
        self._stack = ExitStack()
        self._pass: Pass | None = None  # that is read now
        self._states: list[torch.Tensor | None] | None = None  # of the texts, before the next block
        self._tables: list[Any] = []  # their rotary tables
        self._lengths = (0, 0)  # of text and image in the block's call under way
        self._parts: dict[str, list[torch.Tensor]] = {}  # of the attention under way, a tensor a call of the module
        self._found: list[JointAttention] = []  # in the block's call under way
        self._whole_batch = False  # whether this block's attention computes groups of rows one by one
        self._read = 0  # blocks of the pass
        self._problem: str | None = None  # why the pass cannot be read

    def __enter__(self) -> "Stream":
        with ExitStack() as self._stack:  # an error half-way removes what was registered
            for block in self._blocks:
                self._hook(block.register_forward_pre_hook, self._before_block)
                for module in attentions(block):
                    self._hook_attention(module)
                self._hook(block.register_forward_hook, partial(self._react, self._read_block))
            self._stack = self._stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self.end()
        self._stack.close()

    def begin(
        self,
        arguments: Mapping[str, Any],
        rows: Rows,
        texts: Sequence[torch.Tensor],
        read: Read,
        *,
        strict: bool = True,
    ) -> None:
        """Read some rows (with texts a slice) of the next pass, and each (m, d_text) text in the prompt's place.

        `read` is called after every block with what it computed for the prompt and for each text. What cannot be read
        is a ValueError at once if `strict`; else `finish` returns it, and the pass goes on.
        """
        self.end()
        self._pass, self._read, self._problem = Pass(arguments, rows, texts, read, strict), 0, None

    def finish(self) -> str | None:
        """End a pass that was made. Return why it cannot be read, as where a block took no part; None if it was."""
        skipped = self._pass is not None and self._read != len(self._blocks)
        self.end()
        if skipped:
            return (
                f"a pass called {self._read} of {len(self._blocks)} blocks once: a cache or another change of the "
                "transformer skipped or repeated the others, so its maps would not be those of a denoising step. "
                "Trace without it"
            )
        return self._problem

    def end(self) -> None:
        """Read no more."""
        self._pass = self._states = None
        self._parts, self._found, self._tables = {}, [], []

    # -- hooks ---------------------------------------------------------------------------------------------------

    def _hook(self, register: Callable[..., Any], react: Callable[..., None]) -> None:
        self._stack.callback(register(react, with_kwargs=True).remove)

    def _hook_attention(self, module: Any) -> None:
        def before(module, args, kwargs):
            self._parts = {}

        self._hook(module.register_forward_pre_hook, before)
        for name in ("to_q", "to_k", "to_v", "add_k_proj", "add_v_proj"):
            if getattr(module, name, None) is not None:
                see_output(self._stack, getattr(module, name), partial(self._see, name))
        if getattr(module, "to_out", None) is not None:
            see_input(self._stack, module.to_out[0], partial(self._see, "image"))
        if getattr(module, "to_add_out", None) is not None:
            see_input(self._stack, module.to_add_out, partial(self._see, "text"))
        self._hook(module.register_forward_hook, partial(self._react, self._read_attention))

    @property
    def _sees(self) -> bool:
        return self._pass is not None and who_is_alone() in (None, self)

    def _see(self, name: str, value: torch.Tensor) -> None:
        if self._sees:
            self._parts.setdefault(name, []).append(value.detach())

    def _before_block(self, block: Any, args: tuple, kwargs: Mapping[str, Any]) -> None:
        if self._sees:
            self._found, self._whole_batch = [], False
            self._lengths = (kwargs["encoder_hidden_states"].shape[1], kwargs["hidden_states"].shape[1])

    @torch.no_grad()
    def _react(self, read: Callable[..., None], module: Any, args: tuple, kwargs: Any, output: Any) -> None:
        """Show what a module computed; a pass that cannot be read goes on, unless it is to be refused."""
        inputs = self._pass
        if inputs is None or not self._sees:
            return
        try:
            read(inputs, module, kwargs, output)
        except ValueError as error:
            if inputs.strict:
                raise
            self.end()
            self._problem = str(error)

    def _read_attention(self, inputs: Pass, module: Any, kwargs: Mapping[str, Any], output: Any) -> None:
        (text, image), split = self._lengths, len(self._parts.get("to_q", ())) > 1
        # perturbed-attention guidance computes its perturbed rows, the last of the batch, after the others
        parts = {name: torch.cat(found) if split else found[-1] for name, found in self._parts.items()}
        self._parts, self._whole_batch = {}, self._whole_batch or split
        if not {"to_q", "to_k", "to_v"} <= parts.keys():
            return  # it was not computed; `_after_block` says so
        rows = {name: len(part) for name, part in parts.items()}
        if set(rows.values()) != {len(output[0] if isinstance(output, tuple) else output)}:
            raise ValueError(
                f"{self._names[module]} computed {rows} rows in one pass: its processor splits or repeats the "
                "batch, so that perturbed rows cannot be told from the images' own. Trace without it"
            )
        together = kwargs.get("encoder_hidden_states") is None
        if together and parts["to_q"].shape[1] == image:
            return  # the text does not reach it, as SD 3.5's `attn2`
        text_table, image_table = self._family.split(kwargs.get("image_rotary_emb"), text)

        def heads(x: torch.Tensor, norm: Any, table: Any) -> torch.Tensor:
            x = x.unflatten(2, (module.heads, -1))
            x = x if norm is None else norm(x)
            return self._family.rotate(x, table).transpose(1, 2)

        norm_q, norm_k = getattr(module, "norm_q", None), getattr(module, "norm_k", None)
        norm_text = getattr(module, "norm_added_k", None)
        if together:  # one sequence, the text first, with one set of weights
            parts |= {"add_k_proj": parts["to_k"][:, :text], "to_k": parts["to_k"][:, text:]}
            parts |= {"to_q": parts["to_q"][:, text:], "text": output[:, :text], "image": output[:, text:]}
            norm_text = norm_k
        else:
            parts["to_v"] = torch.cat([parts["add_v_proj"], parts["to_v"]], dim=1)
        queries = heads(parts["to_q"], norm_q, image_table)
        found = JointAttention(
            name=self._names[module],
            scale=queries.shape[-1] ** -0.5,
            queries=queries,
            image_keys=heads(parts["to_k"], norm_k, image_table),
            text_keys=heads(parts["add_k_proj"], norm_text, text_table),
            mask=kwargs.get("encoder_hidden_states_mask"),
            image_vectors=parts["image"],
            text_vectors=parts.get("text"),
            values=parts["to_v"],
        )
        self._found.append(found)

    def _read_block(self, inputs: Pass, block: Any, kwargs: Mapping[str, Any], output: Any) -> None:
        found, texts = self._take(block).rows(inputs.rows), list[JointAttention]()
        found.require_softmax()
        if inputs.texts:
            assert isinstance(inputs.rows, slice)
            batch = len(kwargs["hidden_states"])
            # rows after the images' are perturbed copies of them: what splits the batch must be given the whole of it
            whole = self._whole_batch or range(batch)[inputs.rows].stop != batch
            own, rows = (kwargs, inputs.rows) if whole else (take_rows(kwargs, inputs.rows), slice(None))
            if self._states is None:  # before the first block; an off-loaded denoiser is there when it is called
                like = kwargs["encoder_hidden_states"][inputs.rows]
                lengths = map(len, inputs.texts)
                self._tables = [self._family.rotary(self._denoiser, inputs.arguments, length) for length in lengths]
                states = [self._family.embed(self._denoiser, text[None].to(like)) for text in inputs.texts]
                self._states = [state.expand(len(like), -1, -1) for state in states]
            texts = [self._call_again(block, own, number, rows) for number in range(len(inputs.texts))]
        self._read += 1
        inputs.read(found, tuple(texts))

    def _take(self, block: Any) -> JointAttention:
        if len(self._found) != 1:
            raise ValueError(
                f"{self._names[block]} made {len(self._found)} joint attentions through `to_q` and `to_k`, expected 1: "
                "was it skipped by a cache, or were its layers replaced inside the `with`, as a LoRA does?"
            )
        return self._found.pop()

    def _call_again(self, block: Any, kwargs: Mapping[str, Any], number: int, rows: slice) -> JointAttention:
        """Call the block again with a text in the prompt's place, and store its next state; `rows` are the images'."""
        assert self._states is not None  # a pass is read
        state, image = self._states[number], kwargs["hidden_states"]
        assert state is not None  # a block follows
        state = state.to(image.device).repeat(len(image) // len(state), 1, 1)  # blocks may lie on several devices
        own = {**kwargs, "encoder_hidden_states": state}
        if "image_rotary_emb" in own:
            own["image_rotary_emb"] = on_device(self._tables[number], image.device)
        if "encoder_hidden_states_mask" in own:
            own["encoder_hidden_states_mask"] = None
        self._before_block(block, (), own)
        with alone(self):  # no other stream is to see it
            state, _ = block.forward(**own)  # past the hooks on the block
        self._states[number] = None if state is None else state[rows]
        return self._take(block).rows(rows)


def take_rows(arguments: Mapping[str, Any], rows: slice) -> dict[str, Any]:
    """Return arguments of a pass or a block with only some rows of its batch; the very tensors if those are all."""
    batch, part = len(arguments["hidden_states"]), dict(arguments)
    for name in BATCHED if range(batch)[rows] != range(batch) else ():
        value = part.get(name)
        if isinstance(value, torch.Tensor) and value.ndim and len(value) == batch:
            part[name] = value[rows]
    return part


def attentions(block: torch.nn.Module) -> list[Any]:
    """Return the attentions of a block."""
    return [module for module in block.modules() if hasattr(module, "set_processor") and hasattr(module, "heads")]


def check_readable(denoiser: torch.nn.Module) -> None:
    """ValueError for a denoiser whose attention cannot be seen, or whose blocks cannot be called twice."""
    refuse_caches(denoiser)
    for name, module in denoiser.named_modules():
        if getattr(module, "fused_projections", False) and (
            hasattr(module, "unfuse_projections") or "Fused" in type(module.processor).__name__
        ):
            raise ValueError(f"{name} has fused projections: call pipe.transformer.unfuse_qkv_projections() first")
