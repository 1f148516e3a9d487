"""A step as a C function: a loop over pixels that calls kernels, or calls that make a map whole."""

from __future__ import annotations

import re

from bnncore.device.anchors import ANCHORS
from bnncore.device.body import Body
from bnncore.device.links import link


class Writer(Body):
    """A step's function, written out."""

    def write(self) -> str:
        """The source; then `scratch` is known too."""
        step = self.step
        if step.anchor is None:
            self.take(self.element(step.start), "i32" if step.start == 0 else self.kind(step.start))
        else:
            ANCHORS[step.anchor.op](self, step.anchor, step.start)
        if not self.done:
            before = step.start
            for value, node in step.links:
                link(self, before, value, node)
                before = value
        body = [*self.lines, *(self._columns() if self.columns else self._over_channels())]
        body = self._over_pixels(body)
        text = "\n".join(body)
        indices = [name for name in "bckrxy" if re.search(rf"for \({name} =", text)]
        lines = [f"int {', '.join(indices)};"] if indices else []
        declared = tuple(line for line in self.head if line.startswith("static"))
        lines = [*declared, *lines, *(line for line in self.head if line not in declared), *body]
        # Short code: what is worth writing out says so.
        inside = re.sub(r"^( *)for ", r"\1BNN_ROLLED for ", "\n".join(_in(lines)), flags=re.M)
        name = re.sub(r"[^\w .,:+-]", "_", step.name, flags=re.ASCII)  # no end of the comment
        head = f"static BNN_APART void {self.label}({self.parameters})"
        return f"/* {name} */\n{head}\n{{\n{inside}\n}}\n"

    def _over_channels(self) -> list[str]:
        n = self.channels(self.step.last)
        if len(self.each) < 2:
            return []
        if self.word is None:
            return [f"for (c = 0; c < {n}; c++) {{", *_in(self.each), "}"]
        place, flip = self.word
        if n <= 32:
            first, end, k = "0", f"c < {n}", "0"
        else:
            first, end, k = "32 * k", f"c < {n} && c < 32 * k + 32", "k"
        word = ["uint32_t word = 0;", f"for (c = {first}; {end}; c++) {{", *_in(self.each), "}",
                f"({place})[{k}] = word{f' ^ {flip}[{k}]' if flip else ''};"]  # fmt: skip
        # Braces, for the word is declared here.
        return ["{" if n <= 32 else f"for (k = 0; k < {-(-n // 32)}; k++) {{", *_in(word), "}"]

    def _columns(self) -> list[str]:
        """Channels of 32 pixels: what belongs to a channel is read once for all of them."""
        n, pixels = self.channels(self.step.last), self.size[0] * self.size[1]
        whole = pixels % 32 == 0
        count = "32" if whole else "count"
        lines = [] if whole else [f"const int32_t count = {pixels} - q < 32 ? {pixels} - q : 32;"]
        one = [*([] if whole else ["if (b + r >= count)", "    continue;"]), *self.each]
        if any(re.search(r"\bp\b", line) for line in one):
            one.insert(0, "const int32_t p = q + b + r;")
        turn = [] if self.word is None else ["word <<= 1;"]
        four = ["BNN_UNROLLED for (b = 0; b < 32; b += 8) {", *_in(one), "}"]
        each = [*self.column, "for (r = 7; r >= 0; r--) {", *_in([*self.row, *turn, *four]), "}"]
        if self.word is not None:
            each.insert(0, "uint32_t word = 0;")
            place, flip = self.word
            room = self.room("room", "bnn_u32", 32)
            each.append(f"{room}[c & 31] = word;")
            end, k = ("31", "c >> 5") if n > 32 else (f"{n - 1}", "0")
            turned = f"{flip}[{k}]" if flip else "0"
            call = self.code.call("rows_of_bits", room, "(c & 31) + 1", count, turned, place, k,
                                  -(-n // 32))  # fmt: skip
            full = f"(c & 31) == {end}" + (f" || c == {n - 1}" if n > 32 and n % 32 else "")
            each += [f"if ({full})", f"    {call}"]
        return [*lines, f"for (c = 0; c < {n}; c++) {{", *_in(each), "}"]

    def _over_pixels(self, body: list[str]) -> list[str]:
        h, w = self.size
        if self.group:
            self.head.insert(0, "int32_t q;")
            return [f"for (q = 0; q < {h * w}; q += 32) {{", *_in([*self.group, *body]), "}"]
        if not self.loops:
            return body
        text = "\n".join(body)
        if not re.search(r"\b[xy]\b", text):
            return ["int32_t p;", f"for (p = 0; p < {h * w}; p++) {{", *_in(body), "}"]
        place = [f"const int32_t p = (int32_t)y * {w} + x;"] if re.search(r"\bp\b", text) else []
        return [f"for (y = 0; y < {h}; y++)", f"    for (x = 0; x < {w}; x++) {{",
                *_in(_in([*place, *body])), "    }"]  # fmt: skip

    @property
    def parameters(self) -> str:
        found = []
        if 0 in self.step.inputs:
            found.append("const uint8_t *image")
        flip = [] if self.word is None else [self.word[1]]
        text = "\n".join([*self.head, *self.group, *self.column, *self.lines, *self.each, *flip])
        if re.search(r"\[m\]", text):
            found.append("int m")
        return ", ".join(found) or "void"

    @property
    def arguments(self) -> str:
        return ", ".join(word.split()[-1].lstrip("*") for word in self.parameters.split(", ")
                         if word != "void")  # fmt: skip


def _in(lines: list[str]) -> list[str]:
    return [f"    {line}" for line in lines]
