"""Compiled kernels (numba): the same results as `bnncore.packed.numpy_kernels`, many times faster.

`fuse` decides what one step does, `layouts` how values and weights lie; `tiles` holds the loops,
and `slices` and `matrices` those of two more ways to do a binary convolution.

**Zero padding** is exact and nearly free (see `borders`). A tile of `tiles` holds the same position
of several images and leaves taps in the padding out; where images are few it holds several
positions of one image instead, reads zero bits from a padded copy, and the constant of the border
class takes them out again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import numpy as np

from bnncore.packed import layouts, matrices, numpy_kernels, slices, slicing, tiles
from bnncore.packed.arena import Bind, Kernel, Rooms, Values, at_once
from bnncore.packed.borders import Window, between, divisors, factors
from bnncore.packed.fuse import SUMS, Group, groups
from bnncore.packed.layouts import Room, lanes_of, rounded
from bnncore.packed.numpy_kernels import each_member
from bnncore.packed.program import Node, Program, Tensor, unpack_bits
from bnncore.packed.rules import MAX_TAPS, validate

Array = np.ndarray
Bound = tuple[Callable[[], object], Values]

_MOST_RUNS = 1 << 16  # of a layer, with its padding left out
_MOST_SLICED = (1 << 15) - 1  # products
_FLOAT = np.dtype("f4")
_POOLS = ("maxpool", "avgpool", "sumpool")


TILES: dict[str, np.dtype | None] = {
    "words": np.dtype("u4"),
    "nibbles": np.dtype("u1"),
    "sliced": None,
    "matrix": None,
}


def available() -> list[str]:
    """The tiles that this processor can run, keys of `TILES`."""
    lacking = {"nibbles": "avx2" not in tiles.features(), "matrix": not matrices.here()}
    return [name for name in TILES if not lacking.get(name)]


def plan(program: Program, tile: str | None = None) -> list[Kernel]:
    """Steps for `bnncore.packed.execute`.

    Args:
        tile: what does binary convolutions, where it can: a key of `TILES` (default: for each layer
            and number of images the fastest here, see `tiles.binary_tile`, `slicing.wins` and
            `matrices.wins`).
    """
    return _Planner(program, tile).steps()


class _Planner:
    """Makes steps of the groups of a Program."""

    def __init__(self, program: Program, tile: str | None) -> None:
        self.program, self.tile = program, tile
        self.binary = TILES[tile or "sliced"] or tiles.binary_tile()
        self.shapes = validate(program)
        self.last = len(program.nodes)
        self.table = layouts.nibble_table()
        # The input of a first convolution is held as it is, all others in whole words.
        users: list[set[str]] = [set() for _ in self.shapes]
        for node in program.nodes:
            for number in node.inputs:
                users[number].add(node.op)
        self.bare = {
            number
            for number, node in enumerate(program.nodes, 1)
            if node.op == "normalize" and users[number] == {"conv"}
        }

    def steps(self) -> list[Kernel]:
        return [self.step(group) for group in groups(self.program)]

    def step(self, group: Group) -> Kernel:
        scratch: tuple[int, ...] = ()
        tile: Callable[[int], str] | None = None
        if not group.fits or self.small(group):
            bind = self.plain(group)
        else:
            epilogue = _Epilogue(self.program, group, self.shapes[group.value].dims[-1])
            if group.node.op in SUMS:
                bind, scratch, tile = self.sums(group, epilogue)
            else:
                bind = self.elementwise(group, epilogue)
        if group.outputs == (self.last,):
            bind = self.result(bind)
        rooms = tuple(self.room(number).bytes for number in group.outputs)
        nodes = [group.node, *group.rows.values(), *([group.level] if group.level else [])]
        about = f"{nodes[0].name}: {', '.join(dict.fromkeys(node.op for node in nodes))}"
        return Kernel(
            group.inputs,
            group.outputs,
            group.own,
            at_once(bind),
            rooms + scratch,
            about,
            tile,
            bind,
        )

    def room(self, number: int) -> Room:
        return layouts.room_of(self.shapes[number], self.stride(number))

    def stride(self, number: int) -> int:
        """With how many channels a value is stored."""
        channels = self.shapes[number].dims[-1]
        return channels if number in self.bare or number == 0 else rounded(channels)

    def dims(self, number: int) -> tuple[int, ...]:
        dims = self.shapes[number].dims
        return dims if len(dims) == 3 else (1, 1, *dims)

    def result(self, bind: Bind) -> Bind:
        """Of the last step: numbers (B, classes)."""
        classes = len(self.program.classes)

        def cut(values: Values, member: int, rooms: Rooms) -> Bound:
            call, (output,) = bind(values, member, rooms)
            return call, [output[:, 0, 0, :classes]]

        return cut

    def small(self, group: Group) -> bool:
        """Whether this is the last layer of a few classes: not worth a tile of 16 filters, which
        takes a second to compile and which a wider network has for nothing else."""
        last = group.node.op == "dense" and group.value == self.last
        alone = not (group.rows or group.residual)
        return last and alone and lanes_of(len(self.program.classes)) < tiles.LANES

    def dense(self, group: Group) -> Bind:
        """A dense layer with nothing behind it."""
        place = self.room(group.value)
        slots = {slot: self.program.tensors[name] for slot, name in group.node.tensors.items()}

        def prepare(member: int) -> tuple[Array, Array | float]:
            bias = numpy_kernels.plain(slots["bias"], member) if "bias" in slots else 0.0
            return np.ascontiguousarray(_float_weights(slots, member)), bias

        prepared = each_member(prepare, slots.values())

        def bind(values: Values, member: int, rooms: Rooms) -> Bound:
            weights, bias = prepared(member)
            filters, features = weights.shape
            x, out = values[0][:, 0, 0, :features], place.array(rooms[0], len(values[0]))
            sums = out[:, 0, 0, :filters]

            def call() -> None:
                # Not a product of matrices, for which BLAS would wake threads of its own.
                with np.errstate(all="ignore"):
                    np.einsum("bf,of->bo", x, weights, out=sums)
                    np.add(sums, bias, out=sums)

            return call, [out]

        return bind

    def over_maps(self, group: Group) -> Bind:
        """Sums of whole maps, or their means."""
        place, (high, wide) = self.room(group.value), self.dims(group.inputs[0])[:2]
        mean = group.node.op == "global_avg"

        def bind(values: Values, member: int, rooms: Rooms) -> Bound:
            out = place.array(rooms[0], len(values[0]))
            x, sums = values[0].reshape(len(out), high * wide, -1), out[:, 0, 0]

            def call() -> None:
                with np.errstate(all="ignore"):
                    np.add.reduce(x, axis=1, out=sums)
                    if mean:
                        np.divide(sums, np.float32(high * wide), out=sums)

            return call, [out]

        return bind

    def plain(self, group: Group) -> Bind:
        """A node that no epilogue does."""
        node, place = group.node, self.room(group.value)
        if node.op == "dense":
            return self.dense(group)
        if node.op in ("global_avg", "global_sum") and group.value != self.last:
            return self.over_maps(group)
        words = not any(self.shapes[number].dims[-1] % tiles.LANES for number in node.inputs)
        if node.op in _POOLS and group.value != self.last:
            return self.pool(group)
        if node.op == "normalize" and group.value != self.last:
            return self.normalize(group)
        if node.op == "concat" and words and group.value != self.last:

            def join(values: Values, member: int, rooms: Rooms) -> Bound:
                out = place.array(rooms[0], len(values[0]))
                return partial(np.concatenate, values, axis=3, out=out), [out]

            return join
        shapes = [self.shapes[number] for number in node.inputs]
        slow = numpy_kernels.operator(self.program, node, shapes, self.shapes[group.value])

        def through_numpy(values: Values, member: int, rooms: Rooms) -> Bound:
            plain = [layouts.to_plain(v, s) for v, s in zip(values, shapes, strict=True)]
            out = place.array(rooms[0], len(values[0]))

            def call() -> None:
                with np.errstate(all="ignore"):
                    layouts.from_plain(slow(plain, member), out)

            return call, [out]

        return through_numpy

    def normalize(self, group: Group) -> Bind:
        place = self.room(group.value)
        slots = [self.program.tensors[group.node.tensors[slot]] for slot in ("scale", "shift")]
        prepared = each_member(lambda m: [numpy_kernels.plain(slot, m) for slot in slots], slots)

        def bind(values: Values, member: int, rooms: Rooms) -> Bound:
            out = place.array(rooms[0], len(values[0]))
            scale, shift = prepared(member)
            return partial(tiles.normalize, values[0], scale, shift, out), [out]

        return bind

    def pool(self, group: Group) -> Bind:
        attrs = group.node.attrs
        size, out = self.dims(group.inputs[0])[:2], self.dims(group.value)[:2]
        kernel, stride, pad = (int(attrs[name]) for name in ("kernel", "stride", "pad"))
        reach = pad if attrs.get("include_pad") else 0
        divisor = divisors(size, out, (kernel, kernel), stride, pad, reach)
        factor = np.ones_like(divisor)
        if group.node.op == "sumpool":
            divisor, factor = factor, factors(divisor)
        maximum = group.node.op == "maxpool"
        place = self.room(group.value)
        turn = self.turn(group) if self.shapes[group.value].kind == "bits" else None

        def bind(values: Values, member: int, rooms: Rooms) -> Bound:
            x = values[0]
            out = place.array(rooms[0], len(x))
            size = (kernel, stride, pad)
            if turn:
                return partial(tiles.pool_bits, x, *size, turn(member), out), [out]
            return partial(tiles.pool, x, *size, divisor, factor, maximum, out), [out]

        return bind

    def turn(self, group: Group) -> Callable[[int], Array]:
        """Of a member, words of the bits of which the smallest is wanted."""
        name, channels = group.node.tensors.get("direction"), self.shapes[group.value].dims[-1]
        if name is None:
            none = layouts.to_words(np.zeros(channels, bool))
            return lambda member: none
        slot = self.program.tensors[name]
        return each_member(lambda m: layouts.to_words(~unpack_bits(_copy(slot, m))), [slot])

    def elementwise(self, group: Group, epilogue: _Epilogue) -> Bind:
        places = [self.room(number) for number in group.outputs]

        def bind(values: Values, member: int, rooms: Rooms) -> Bound:
            x = values[0]
            outs = [place.array(room, len(x)) for place, room in zip(places, rooms, strict=True)]
            return partial(tiles.finish, x, *epilogue.arguments(member, values, outs)), outs

        return bind

    def sums(
        self, group: Group, epilogue: _Epilogue
    ) -> tuple[Bind, tuple[int, ...], Callable[[int], str]]:
        """A convolution, or a dense layer as a convolution of a map of one pixel: how it runs, with
        how much room, and on which tile for so many images."""
        node, program = group.node, self.program
        binary = node.op == "bconv"
        slots = {slot: program.tensors[name] for slot, name in node.tensors.items()}
        filters, *kernel = slots["weight"].shape[:-1]
        source = node.inputs[0]
        inputs, outputs = self.dims(source), self.dims(group.value)
        kh, kw = kernel or (1, 1)
        stride, pad = int(node.attrs.get("stride", 1)), int(node.attrs.get("pad", 0))
        stored = self.stride(source)
        dtype = self.binary if binary else _FLOAT
        if binary and kh * kw * stored > tiles.LONGEST:
            dtype = np.dtype("u4")
        window = Window.of((kh, kw), stride, pad, inputs[:2], outputs[:2])
        places = [self.room(number) for number in group.outputs]
        if binary and (matrix := self.matrix(group, epilogue, window, places)):
            return matrix, (), lambda images: "matrix"
        lanes, word = lanes_of(filters), lanes_of(inputs[2])
        if dtype == np.uint8:
            steps, unit, step, longest = stored // 8, 1, 2 * lanes, tiles.BYTE_STEPS
        elif binary:
            steps, unit, step, longest = stored // word, word // 8, 4 * lanes, 0
        else:
            steps, unit, step, longest = stored, 4, 4 * lanes, 0
        around = layouts.geometry(window, steps, unit, step, longest, False)
        # Not worth it, nor the memory, where nearly every position is a class of its own.
        few = window.classes * len(around.runs) <= _MOST_RUNS
        bytes_ = source == 0  # copied to floats, with what stands in their padding
        few = few and not bytes_
        inner = layouts.geometry(window, steps, unit, step, longest, True) if few and pad else None
        share = window.share()
        pixels = tiles.tile_pixels(dtype, lanes)
        table = self.table
        held = self.room(source)
        high, wide, *channels = held.shape
        padded = Room((high + 2 * pad, wide + 2 * pad, *channels), held.dtype)

        def lay_out(member: int) -> tuple[Array, Array, Array]:
            """Weights, and the constants without taps in the padding and with them."""
            inside = np.zeros((window.classes, rounded(filters)), np.int32 if binary else _FLOAT)
            if not binary:
                weights = _float_weights(slots, member).reshape(filters, kh, kw, -1)
                room = np.zeros((*weights.shape[:3], stored), np.float32)
                room[..., : weights.shape[3]] = weights
                if "bias" in slots:
                    inside[:, :filters] = numpy_kernels.plain(slots["bias"], member)
                return layouts.lay_out(room.reshape(filters, -1), dtype), inside, inside
            words = _words(slots["weight"], member)
            whole = inside.copy()
            inside[:, :filters] = window.products(inputs[2])
            ones = np.bitwise_count(words).sum(3, dtype=np.int32)
            whole[:, :filters] = window.constants(ones, inputs[2])
            return layouts.lay_out(words.reshape(filters, -1), dtype), inside, whole

        alone = binary and epilogue.parts == tiles.BITS

        def limits(constants: Array, member: int) -> Array:
            """See `tiles.convolve`."""
            kind = np.dtype("u2" if dtype == np.uint8 else "u4")
            if not alone:
                return np.empty((0, 0, 0, 0), kind)
            least, most = between(constants, *epilogue.limits(member))
            top = np.iinfo(kind).max  # which no count reaches
            least, most = np.maximum(least, 0), np.minimum(most, top)
            never = least > most
            rows = np.stack([np.where(never, top, least), np.where(never, 0, most - least)], 1)
            return layouts.aligned(
                rows.astype(kind).reshape(len(rows), 2, -1, lanes).transpose(0, 2, 1, 3)
            )

        prepared = each_member(lay_out, slots.values())
        bounds = each_member(
            lambda m: [limits(constants, m) for constants in prepared(m)[1:]],
            [*slots.values(), *epilogue.tensors],
        )
        sliced = self.sliced(group, epilogue, window, places) if binary else None

        def tile(images: int) -> str:
            if sliced and (self.tile or slicing.worth(outputs[:2], images)):
                return "sliced"
            return "floats" if not binary else "nibbles" if dtype == np.uint8 else "words"

        zeros = each_member(
            lambda m: numpy_kernels.plain(slots["zero"], m) if bytes_ else 0, slots.values()
        )

        def bind(values: Values, member: int, rooms: Rooms) -> Bound:
            x = values[0]
            images = len(x)
            if sliced and tile(images) == "sliced":
                return sliced(values, member, rooms)
            weights, inside, whole = prepared(member)
            inside_limits, whole_limits = bounds(member)
            outs = [place.array(room, images) for place, room in zip(places, rooms, strict=False)]
            # Tiles of images leave out padding, but the last ones may be half empty.
            skip = inner is not None and -(-images // pixels) * pixels * share < images
            lay = inner if skip else around
            assert lay is not None
            before = None
            if bytes_ or (pad and not skip):
                room = padded.array(rooms[-1], images)
                before, x = partial(layouts.pad, x, pad, room, zeros(member)), room
            strip = x.shape[1] * x.shape[2] * steps * unit
            if dtype == np.uint8:
                x = x.view(np.uint8)  # read by the byte, whatever its words
            convolve = partial(
                tiles.convolve, x, strip, images, weights.reshape(-1),
                weights.shape[1], table, lay.runs, lay.spans, lay.starts, lay.classes,
                inside if skip else whole, inside_limits if skip else whole_limits, skip, pixels,
                *epilogue.arguments(member, values, outs),
            )  # fmt: skip
            return partial(_both, before, convolve) if before else convolve, outs

        return bind, (padded.bytes,) if pad or bytes_ else (), tile

    def matrix(
        self, group: Group, epilogue: _Epilogue, window: Window, places: Sequence[Room]
    ) -> Bind | None:
        """A binary convolution by `matrices`, where it can and should be."""
        tensor = self.program.tensors[group.node.tensors["weight"]]
        out, lanes = self.dims(group.value)[:2], lanes_of(tensor.shape[0])
        wanted = self.tile == "matrix" if self.tile else matrices.wins(tensor.shape, window, out)
        if not wanted or not matrices.here():
            return None
        weights = each_member(lambda m: matrices.lay_out(unpack_bits(_copy(tensor, m))), [tensor])
        bounds = each_member(
            lambda m: matrices.limits(*epilogue.limits(m), lanes), epilogue.tensors
        )
        none = np.empty((0, 0, 0), np.int32)
        lay = matrices.Lay.of(window, out, tensor.shape[3])

        def bind(values: Values, member: int, rooms: Rooms) -> Bound:
            images = len(values[0])
            outs = [place.array(room, images) for place, room in zip(places, rooms, strict=False)]
            call = partial(
                matrices.convolve, values[0], *lay, weights(member),
                bounds(member) if epilogue.parts == tiles.BITS else none,
                *epilogue.arguments(member, values, outs),
            )  # fmt: skip
            return call, outs

        return bind

    def sliced(
        self, group: Group, epilogue: _Epilogue, window: Window, places: Sequence[Room]
    ) -> Bind | None:
        """A binary convolution by `slices`, where it can and should be."""
        tensor = self.program.tensors[group.node.tensors["weight"]]
        filters, kh, kw, channels = tensor.shape
        stride, pad, inputs, out = (
            window.stride,
            window.pad,
            window.inputs,
            self.dims(group.value)[:2],
        )
        plain = not (group.rows or group.residual or group.numbers)
        products = kh * kw * channels
        if (window.classes > 1 and channels % 2) or products > _MOST_SLICED:
            return None  # `slicing.sums` says why; and sums are two bytes
        if len(slicing.Taps.of(channels, kw).channel) > slicing.MOST_TRIPLES:
            return None
        if slicing.columns(window, out) is None:
            return None
        wanted = (
            self.tile == "sliced" if self.tile else slicing.wins(tensor.shape, stride, out, plain)
        )
        if not wanted:
            return None
        whole = rounded(filters)
        order = slicing.Order.of((kh, kw), channels)

        def prepare(member: int) -> slicing.Weights:
            bits = unpack_bits(_copy(tensor, member))
            constants = window.constants(bits.sum(3, dtype=np.int32), channels)
            zeros, found = np.zeros(whole, np.int32), None
            picks = slicing.picks(bits, order)
            if plain:
                planes = max(7, products.bit_length() + 1)
                low, high = (ends[:filters] for ends in epilogue.limits(member))
                found = slicing.limits(constants, low, high, planes)
            if found:
                first, up = found
                negated = layouts.to_words(np.pad(up, (0, whole - filters)))
                return slicing.Weights(picks, planes, True, first, zeros, negated, {})
            first, most = slicing.sums(constants)
            planes = max(7, int(first.max() + products).bit_length())
            zeros[:filters] = most
            none = np.zeros(whole // lanes_of(filters), layouts.word_of(filters))
            return slicing.Weights(picks, planes, False, first, zeros, none, {})

        prepared = each_member(prepare, [tensor, *epilogue.tensors])
        lays: dict[int, slicing.Lay] = {}

        def bind(values: Values, member: int, rooms: Rooms) -> Bound:
            x = values[0]
            images = len(x)
            if images not in lays:
                lays[images] = slicing.Lay.of(window, out, channels, images)
            lay, mine = lays[images], prepared(member)
            if lay.key not in mine.starts:
                mine.starts[lay.key] = slicing.start(window, lay, out, mine.first, mine.planes)
            outs = [place.array(room, images) for place, room in zip(places, rooms, strict=False)]
            parts, params, flips, *rest = epilogue.arguments(member, values, outs)
            call = partial(
                slices.convolve, x, np.array([images, *inputs, *out, kh, stride, pad], np.int64),
                lay.lay, lay.lanes, lay.taps, order.rows, order.spans, mine.picks,
                *mine.starts[lay.key], mine.planes, mine.as_bits, mine.constants, parts, params,
                flips, flips ^ mine.negated, *rest,
            )  # fmt: skip
            return call, outs

        return bind


def _both(first: Callable[[], object], second: Callable[[], object]) -> None:
    first()
    second()


def _words(tensor: Tensor, member: int) -> Array:
    """One member's copy of binary weights (O,kh,kw,C), as (O,kh,kw,words)."""
    tensor = _copy(tensor, member)
    if tensor.shape[-1] % lanes_of(tensor.shape[-1]) == 0:
        return tensor.data.view(layouts.word_of(tensor.shape[-1])).reshape(*tensor.shape[:-1], -1)
    return layouts.to_words(unpack_bits(tensor))


def _copy(tensor: Tensor, member: int) -> Tensor:
    """One member's copy."""
    return replace(tensor, own=False, data=tensor.data[member]) if tensor.own else tensor


def _float_weights(slots: dict[str, Tensor], member: int) -> Array:
    weight = numpy_kernels.plain(slots["weight"], member)
    scale = numpy_kernels.plain(slots["weight_scale"], member) if "weight_scale" in slots else None
    return numpy_kernels.float_weight(weight, scale)


class _Epilogue:
    """Arguments of the tiles for what a group does behind its sums."""

    def __init__(self, program: Program, group: Group, channels: int) -> None:
        self.program, self.group, self.channels = program, group, channels
        self.parts = tiles.NUMBERS * group.numbers | tiles.BITS * (group.level is not None)
        floats = not any(node.op == "rescale" for node in group.rows.values())
        self.parts |= tiles.RESIDUAL * (group.residual and floats)
        for row, node in group.rows.items():
            whole = node.op == "rescale"
            if not whole:
                self.parts |= 1 << row
            else:
                self.parts |= tiles.RESCALE if row < tiles.GROUP else tiles.AGAIN
            if len(node.inputs) == 2:
                self.parts |= tiles.ADDED if row < tiles.GROUP else tiles.ADDED_AGAIN
        if group.numbers and channels % lanes_of(channels):
            self.parts |= tiles.CLEAR  # infinity times the weights of no filter is not 0
        nodes = [*group.rows.values(), *([group.level] if group.level else [])]
        names = [name for node in nodes for name in node.tensors.values()]
        self.tensors = [program.tensors[name] for name in names]
        self.params = each_member(self.prepare, self.tensors)
        word = layouts.word_of(channels)
        self.none = np.empty((0, 0, 0, 0), np.float32), np.empty((0, 0, 0, 0), word)

    def get(self, node: Node, slot: str, member: int, absent: float = 0) -> Array | float:
        """A member's tensor, as floats or booleans."""
        name = node.tensors.get(slot)
        if name is None:
            return absent
        data = numpy_kernels.plain(self.program.tensors[name], member)
        if data.dtype.kind != "i":
            return data
        # A level that no sum reaches becomes infinite, so that rounding it does not matter.
        return np.where(np.abs(data.astype(np.float64)) > MAX_TAPS, np.copysign(np.inf, data), data)

    def prepare(self, member: int) -> tuple[Array, Array]:
        """The rows of parameters, and which bits to negate."""
        count = self.channels
        rows = np.zeros((tiles.ROWS, rounded(count)), np.float32)
        rows[tiles.LIVE, :count] = 1
        for first in (0, tiles.GROUP):
            rows[[first, first + 3, first + 4], :count] = 1  # as good as nothing
            rows[first + 2] = -np.inf
        for row, node in self.group.rows.items():
            if node.op == "affine":
                rows[row, :count] = self.get(node, "scale", member, 1)
                rows[row + 1, :count] = self.get(node, "shift", member)
            elif node.op == "prelu":
                rows[row + 1, :count] = self.get(node, "slope", member)
            elif node.op == "fixed":
                rows[row, :count] = 2.0 ** -node.attrs["fraction"]
            elif node.op == "rescale":
                whole = rows[row : row + tiles.GROUP].view(np.int32)
                whole[:] = 0
                scale = self.get(node, "scale", member)
                whole[0, :count] = scale
                whole[1, :count] = (
                    self.get(node, "slope", member) if "slope" in node.tensors else scale
                )
                whole[2, :count] = numpy_kernels.plain(
                    self.program.tensors[node.tensors["shift"]], member
                )
                for place, name in enumerate(("right", "low", "high"), 3):
                    whole[place, :count] = node.attrs[name]
            else:
                rows[row, :count], rows[row + 1, :count] = np.finfo(np.float32).min, 0
        flips = np.zeros(rounded(count), bool)
        rows[tiles.LOW] = np.inf  # no bit beyond the last channel
        rows[tiles.HIGH, :count] = np.inf
        if (level := self.group.level) is not None:
            if level.op == "sign":
                rows[tiles.LOW, :count] = 0
            elif level.op == "threshold":
                limit = self.get(level, "threshold", member)
                up = self.get(level, "direction", member, 1)
                rows[tiles.LOW, :count] = np.where(up, limit, -np.inf)
                rows[tiles.HIGH, :count] = np.where(up, np.inf, limit)
            else:
                rows[tiles.LOW, :count] = self.get(level, "low", member)
                rows[tiles.HIGH, :count] = self.get(level, "high", member)
                flips[:count] = np.logical_not(self.get(level, "inside", member, 1))
        params = rows.reshape(tiles.ROWS, -1, lanes_of(count)).transpose(1, 0, 2)
        return layouts.aligned(params), layouts.to_words(flips)

    def limits(self, member: int) -> tuple[Array, Array]:
        """Between which values a bit is 1, or where it is negated 0; each of whole tiles."""
        params = self.params(member)[0].transpose(1, 0, 2).reshape(tiles.ROWS, -1)
        return params[tiles.LOW], params[tiles.HIGH]

    def arguments(self, member: int, values: Sequence[Array], outs: Sequence[Array]) -> tuple:
        """parts, params, flips, residual, numbers, bits."""
        none, no_bits = self.none
        residual = values[-1] if self.group.residual else none
        numbers = outs[0] if self.group.numbers else none
        bits = outs[-1] if self.group.level is not None else no_bits
        return self.parts, *self.params(member), residual, numbers, bits
