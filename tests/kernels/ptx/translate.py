"""PTX, as Triton writes it, to C++ that machine.hpp runs: one statement an instruction.

The subset is what the kernels of this project use; anything else is an `Untranslatable` that names
the instruction. Approximate functions are exact here, and denormal numbers are kept.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

FILES = {"r": "r", "rd": "d", "rs": "h", "p": "p"}
HELD = {"r": "u32", "rd": "u64", "rs": "u16", "p": "u8"}
DECLARED = {"r": "b32", "rd": "b64", "rs": "b16", "p": "pred"}
SIGNED = {"b": "u", "s": "s", "u": "u"}
INTEGERS = {f"{k}{n}": f"{SIGNED[k]}{n}" for k in SIGNED for n in (8, 16, 32, 64)}
READ = {
    "f32": "f32(u32({}))",
    "f64": "f64(u64({}))",
    "bf16": "bf16(u16({}))",
    "f16": "f16(u16({}))",
    "pred": "bool({})",
} | {name: f"{held}({{}})" for name, held in INTEGERS.items()}
WRITE = {
    "f32": "bits({})",
    "f64": "bits64({})",
    "bf16": "to_bf16({})",
    "f16": "to_f16({})",
    "pred": "bool({})",
}
WIDER = {"s16": "s32", "u16": "u32", "s32": "s64", "u32": "u64"}
SIGNS = {
    "add": "+", "sub": "-", "mul": "*", "div": "/", "rem": "%", "and": "&", "or": "|", "xor": "^",
}  # fmt: skip
COMPARISONS = {
    "eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">=",
    "lo": "<", "ls": "<=", "hi": ">", "hs": ">=",
}  # fmt: skip
FUNCTIONS = {
    "ex2": "std::exp2({})",
    "lg2": "std::log2({})",
    "rsqrt": "1.0f / std::sqrt({})",
    "sqrt": "std::sqrt({})",
    "rcp": "1.0f / {}",
    "tanh": "std::tanh({})",
    "neg": "-{}",
    "abs": "std::fabs({})",
}
ROUNDINGS = {"rzi": "trunc", "rni": "nearbyint", "rmi": "floor", "rpi": "ceil"}


class Untranslatable(ValueError):
    """An instruction that the machine has not."""


class Instruction(NamedTuple):
    """One instruction.

    Attributes:
        name: with all modifiers. operands: as written. guard: a C++ condition, or "".
        line: of the PTX, from 1.
    """

    name: str
    operands: list[str]
    guard: str
    line: int

    @property
    def parts(self) -> list[str]:
        """The opcode and its modifiers."""
        return self.name.split(".")

    @property
    def type(self) -> str:
        """The last modifier."""
        return self.parts[-1]

    def value(self, index: int, kind: str | None = None) -> str:
        """Operand `index` as a C++ value of a type of PTX."""
        return value(self.operands[index], kind or self.type)

    def each(self, *statements: str) -> str:
        """Statements for every lane that the guard lets pass."""
        condition = f"if ({self.guard}) " if self.guard else ""
        return f"EACH {condition}{{ {' '.join(statements)} }}"

    def result(self, expression: str, kind: str | None = None) -> str:
        """The first operand of each lane is the expression."""
        return self.each(assign(self.operands[0], kind or self.type, expression))

    def whole(self, *statements: str) -> str:
        """Statements for the warp, which no guard may divide."""
        if self.guard:
            raise Untranslatable("has a guard")
        return f"{{ {' '.join(statements)} }}"


def width(kind: str) -> int:
    """Bits of a type."""
    return 1 if kind == "pred" else int(re.sub(r"\D", "", kind))


def split(operands: str) -> list[str]:
    """Operands at the commas outside of brackets."""
    return [part.strip() for part in re.split(r",(?![^{\[]*[}\]])", operands) if part.strip()]


def members(operand: str) -> list[str]:
    """Those of {a, b}, or the operand alone."""
    return split(operand[1:-1]) if operand.startswith("{") else [operand]


def register(operand: str) -> tuple[str, int] | None:
    """Prefix and number of a register."""
    found = re.fullmatch(r"%(rd|rs|r|p)(\d+)", operand)
    return (found[1], int(found[2])) if found else None


def numbers(operand: str) -> str:
    """The registers of 32 bits of a list, as a C++ array."""
    found = [register(one) for one in members(operand)]
    if not all(one and one[0] == "r" for one in found):
        raise Untranslatable(f"wants registers of 32 bits, not {operand}")
    return f"{{{', '.join(str(one[1]) for one in found if one)}}}"


def raw(operand: str) -> str:
    """An operand's bits in lane l."""
    if found := register(operand):
        return f"w.{FILES[found[0]]}[{found[1]}][l]"
    if found := re.fullmatch(r"%(n?ctaid)\.([xyz])", operand):
        return f"w.{'grid' if found[1] == 'nctaid' else 'cta_index'}[{'xyz'.index(found[2])}]"
    if found := re.fullmatch(r"global_smem(?:\+(\d+))?", operand):
        return found[1] or "0"
    if re.fullmatch(r"0f[0-9A-Fa-f]{8}|0d[0-9A-Fa-f]{16}", operand):
        return f"0x{operand[2:]}ull"
    if found := re.fullmatch(r"(-?\d+|0x[0-9A-Fa-f]+)U?", operand):
        return f"{found[1]}ll" if "x" not in operand else f"{found[1]}ull"
    named = {"%tid.x": "w.thread + l", "%laneid": "l", "true": "1", "false": "0"}
    if operand in named:
        return named[operand]
    raise Untranslatable(f"has an operand {operand}")


def value(operand: str, kind: str) -> str:
    """An operand in lane l as a C++ value of a type of PTX."""
    return READ[kind].format(raw(operand))


def assign(operand: str, kind: str, expression: str) -> str:
    """A register in lane l takes a C++ value of a type of PTX."""
    if operand == "_":
        return ""
    found = register(operand)
    if not found:
        raise Untranslatable(f"writes to {operand}")
    bits = WRITE.get(kind, "{}").format(expression)
    return f"{raw(operand)} = {HELD[found[0]]}({bits});"


def address(operand: str, kind: str) -> str:
    """What [register + offset] is in lane l."""
    found = re.fullmatch(r"\[\s*(%?\w+)\s*(?:\+\s*(-?\d+)\s*)?\]", operand)
    if not found:
        raise Untranslatable(f"has an address {operand}")
    return f"{kind}({raw(found[1])} + {found[2] or 0})"


def nothing(i: Instruction) -> str:
    """Orders what happens in order here."""
    return ";"


def branch(i: Instruction) -> str:
    label = i.operands[0].lstrip("$")
    if not i.guard:
        return f"goto {label};"
    predicate, wanted = i.guard.replace("[l]", "").lstrip("!"), str(i.guard[0] != "!").lower()
    return f"if (branches(w, {predicate}, {wanted}, {i.line})) goto {label};"


def end(i: Instruction) -> str:
    return i.whole("w.state = State::done;", "return;")


def barrier(i: Instruction) -> str:
    if i.operands != ["0"]:
        raise Untranslatable("is a barrier other than 0")
    return i.whole("PAUSE(State::waiting)")


def move(i: Instruction) -> str:
    to, given = i.operands
    if to.startswith("{"):
        parts = members(to)
        each = width(i.type) // len(parts)
        values = (f"u{each}(q >> {each * n})" for n in range(len(parts)))
        return i.each(
            f"u64 q = {i.value(1)};",
            *(assign(p, f"u{each}", v) for p, v in zip(parts, values, strict=True)),
        )
    if given.startswith("{"):
        parts = members(given)
        each = width(i.type) // len(parts)
        return i.result(
            " | ".join(f"u64({value(p, f'u{each}')}) << {each * n}" for n, p in enumerate(parts))
        )
    return i.result(i.value(1, "pred" if i.type == "pred" else f"b{width(i.type)}"), "b64")


def convert(i: Instruction) -> str:
    to, given = i.parts[-2:]
    if to in ("bf16x2", "f16x2"):
        high, low = (f"to_{to[:-2]}({i.value(n, 'f32')})" for n in (1, 2))
        return i.result(f"u32({high}) << 16 | {low}", "b32")
    if to == "tf32":
        return i.result(f"to_tf32({i.value(1, 'b32')})", "b32")
    x = i.value(1, given)
    if to[0] in "su":
        if given[0] in "fb":
            x = f"std::{ROUNDINGS[i.parts[1]]}({x})"
        x = f"{to}({x})"
    elif to in ("f32", "f64"):
        x = f"{'float' if to == 'f32' else 'double'}({x})"
    return i.result(x, to)


def arithmetic(i: Instruction) -> str:
    """Sums, differences, products: of whole numbers modulo 2**n, whatever their sign."""
    sign = SIGNS[i.parts[0]]
    if "f" in i.type:
        return i.result(f"{i.value(1)} {sign} {i.value(2)}")
    return i.result(f"u64({i.value(1)}) {sign} u64({i.value(2)})")


def pair(i: Instruction) -> str:
    """Arithmetic of both halves of registers."""
    kind, form = i.type[:-2], "{} " + SIGNS.get(i.parts[0], "") + " {}"
    if i.parts[0] == "fma":
        form = "float(std::fma(double({}), double({}), double({})))"
    halves = []
    for n in (0, 16):
        given = (f"u16({value(x, 'u32')} >> {n})" for x in i.operands[1:])
        halves.append(WRITE[kind].format(form.format(*(f"{kind}({x})" for x in given))))
    return i.result(f"u32({halves[1]}) << 16 | {halves[0]}", "b32")


def wide_product(i: Instruction) -> str:
    wide = WIDER[i.type]
    product = f"{wide}({i.value(1)}) * {wide}({i.value(2)})"
    return i.result(product if i.parts[0] == "mul" else f"{product} + {i.value(3, wide)}", wide)


def high_product(i: Instruction) -> str:
    wide = "__int128" if i.type[0] == "s" else "unsigned __int128"
    return i.result(f"({wide})({i.value(1)}) * {i.value(2)} >> {width(i.type)}")


def multiply_add(i: Instruction) -> str:
    if i.parts[0] == "fma":
        return i.result(f"std::fma({i.value(1)}, {i.value(2)}, {i.value(3)})")
    return i.result(f"u64({i.value(1)}) * u64({i.value(2)}) + u64({i.value(3)})")


def divide(i: Instruction) -> str:
    x, y, sign = i.value(1), i.value(2), SIGNS[i.parts[0]]
    return i.result(f"{x} / {y}" if i.type[0] == "f" else f"{y} ? {x} {sign} {y} : 0")


def logic(i: Instruction) -> str:
    return i.result(f"{i.value(1)} {SIGNS[i.parts[0]]} {i.value(2)}")


def negate(i: Instruction) -> str:
    return i.result(("!" if i.type == "pred" else "~") + i.value(1))


def shift(i: Instruction) -> str:
    """Past the width nothing is left, or the sign."""
    n, bits = i.value(2, "u32"), width(i.type)
    if i.parts[0] == "shl":
        return i.result(f"{n} >= {bits} ? 0 : u64({i.value(1)}) << {n}")
    if i.type[0] == "s":
        return i.result(f"{i.value(1)} >> ({n} >= {bits} ? {bits - 1} : {n})")
    return i.result(f"{n} >= {bits} ? 0 : {i.value(1)} >> {n}")


def extreme(i: Instruction) -> str:
    """Of two numbers; of a number and NaN the number, unless the modifier NaN is there."""
    get = f"auto x = {i.value(1)}, y = {i.value(2)};"
    name = i.parts[0]
    if i.type[0] == "f":
        chosen = f"std::f{name}(x, y)"
        if "NaN" in i.parts:
            chosen = f"x != x || y != y ? NAN : {chosen}"
    else:
        chosen = "x < y ? x : y" if name == "min" else "x < y ? y : x"
    return i.each(get, assign(i.operands[0], i.type, chosen))


def function(i: Instruction) -> str:
    form = FUNCTIONS[i.parts[0]]
    if i.type[0] == "s":
        form = {"neg": "-s64({})", "abs": "std::abs(s64({}))"}[i.parts[0]]
    return i.result(form.format(i.value(1)))


def select(i: Instruction) -> str:
    kind = f"u{width(i.type)}"
    return i.result(f"{i.value(3, 'pred')} ? {i.value(1, kind)} : {i.value(2, kind)}", kind)


def compare(i: Instruction) -> str:
    """Of floats: all but ne, and all that end in u, are false where an operand is NaN."""
    test, x, y = i.parts[1], i.value(1), i.value(2)
    unordered = f"({x} != {x} || {y} != {y})"
    floats = "f" in i.type
    if test in ("nan", "num"):
        found = unordered if test == "nan" else f"!{unordered}"
    elif floats and test == "ne":
        found = f"({x} < {y} || {x} > {y})"
    elif floats and test not in COMPARISONS:
        found = f"({unordered} || {x} {COMPARISONS[test[:-1]]} {y})"
    else:
        found = f"({x} {COMPARISONS[test]} {y})"
    if i.parts[2] in ("and", "or", "xor"):
        found = f"{found} {SIGNS[i.parts[2]]} {i.value(3, 'pred')}"
    return i.result(found, "pred")


def bits(i: Instruction) -> str:
    """Bit fields, permutations of bytes, any function of three bits."""
    name, kind = i.parts[0], i.type
    if name == "bfe":
        position, count, signed = i.value(2, "u32"), i.value(3, "u32"), str(kind[0] == "s").lower()
        x = i.value(1, f"u{width(kind)}")
        return i.result(f"extract_bits({x}, {position}, {count}, {width(kind)}, {signed})")
    if name == "bfi":
        place = f"{i.value(3, 'u32')}, {i.value(4, 'u32')}"
        return i.result(f"insert_bits({i.value(1)}, {i.value(2)}, {place})")
    called = {"prmt": "byte_permute", "lop3": "logic3"}[name]
    given = ", ".join(i.value(n, "u32") for n in range(1, len(i.operands)))
    return i.result(f"{called}({given})")


def funnel(i: Instruction) -> str:
    """The shift of a pair, by the count modulo 32."""
    pair = f"(u64({i.value(2)}) << 32 | {i.value(1)})"
    n = f"({i.value(3, 'u32')} & 31)"
    return i.result(f"{pair} << {n} >> 32" if i.parts[1] == "l" else f"{pair} >> {n}")


def shuffle(i: Instruction) -> str:
    """Lanes give each other values; one that would ask beyond the warp keeps its own."""
    mode = i.parts[2]
    to, given, by, clamp, mask = i.operands
    if "|" in to or clamp != ("0" if mode == "up" else "31") or mask not in ("-1", "0xffffffff"):
        raise Untranslatable("is not a shuffle of a whole warp")
    source = {"bfly": "l ^ n", "idx": "n", "up": "l - n", "down": "l + n"}[mode]
    return i.whole(
        f"u32 all[LANES]; EACH all[l] = {value(given, 'u32')};",
        f"EACH {{ int n = {value(by, 'u32')} & 31, from = {source};",
        assign(to, "u32", "all[from < 0 || from >= LANES ? l : from]"),
        "}",
    )


def reduce(i: Instruction) -> str:
    operation, kind = i.parts[2], i.type
    x = i.value(1, kind)
    step = {
        "add": "all + x", "and": "all & x", "or": "all | x", "xor": "all ^ x",
        "min": "x < all ? x : all", "max": "x > all ? x : all",
    }[operation]  # fmt: skip
    return i.whole(
        f"{INTEGERS[kind]} all = 0;",
        f"EACH {{ auto x = {x}; all = l == 0 ? x : {step}; }}",
        f"EACH {{ {assign(i.operands[0], kind, 'all')} }}",
    )


def parameter(i: Instruction) -> str:
    """The parameters are numbered by the translation, see `translate`."""
    found = re.fullmatch(r"\[\w+_param_(\d+)\]", i.operands[1])
    if not found:
        raise Untranslatable(f"has an address {i.operands[1]}")
    kind = INTEGERS.get(i.type, f"u{width(i.type)}")
    return i.result(f"*static_cast<{kind}*>(w.params[{found[1]}])", kind)


def access(i: Instruction) -> str:
    """Loads and stores of one or more elements that lie one after another."""
    loads, space = i.parts[0] == "ld", i.parts[1]
    place, given = i.operands if not loads else i.operands[::-1]
    parts, kind = members(given), f"u{width(i.type)}"
    count = next((int(part[1]) for part in i.parts if re.fullmatch(r"v\d", part)), 1)
    if count != len(parts):
        raise Untranslatable(f"does not have {count} elements")
    size = width(i.type) // 8 * count
    values = "" if loads else f" = {{{', '.join(value(p, kind) for p in parts)}}}"
    what = [f"{kind} q[{count}]{values};"]
    after = ""
    if space == "shared":
        at = f"shared(w, {address(place, 'u32')}, {size}, {i.line})"
        what.append(f"std::memcpy({f'q, {at}' if loads else f'{at}, q'}, {size});")
    elif loads:
        acquires = "acquire" in i.parts
        coherent = bool({"cg", "acquire", "relaxed", "volatile"} & set(i.parts))
        cache = "coherent" if coherent else "never_emptied" if "nc" in i.parts else "l1"
        what.append("acquire(w);" if acquires else "")
        what.append(f"load(w, {address(place, 'u64')}, q, {size}, {i.line}, Cache::{cache});")
        after = " PAUSE(State::running)" if acquires or "relaxed" in i.parts else ""
    else:
        what.append(f"store(w, {address(place, 'u64')}, q, {size}, {i.line});")
        after = " if (chance(8)) PAUSE(State::running)"
    if loads:
        what += [assign(p, kind, f"q[{n}]") for n, p in enumerate(parts)]
    return i.each(*what) + after


def atomic(i: Instruction) -> str:
    """Addition; other warps may run before it is known to have happened."""
    releases, acquires = (
        str(bool({name, "acq_rel"} & set(i.parts))).lower() for name in ("release", "acquire")
    )
    at = address(i.operands[1], "u64")
    call = f"atomic_add(w, {at}, {i.value(2, 'u32')}, {i.line}, {acquires}, {releases})"
    return i.each(
        f"u32 before = {call};", assign(i.operands[0], "u32", "before")
    ) + " if (chance(2)) PAUSE(State::running)"  # fmt: skip


def matrix_move(i: Instruction) -> str:
    loads, transposed = i.parts[0] == "ldmatrix", str("trans" in i.parts).lower()
    place, given = i.operands if not loads else i.operands[::-1]
    return i.whole(
        f"u32 at[LANES]; EACH at[l] = {address(place, 'u32')};",
        f"const int tiles[] = {numbers(given)};",
        f"{i.parts[0]}(w, at, tiles, {len(members(given))}, {transposed}, {i.line});",
    )


def mma(i: Instruction) -> str:
    depth = int(i.parts[3].partition("k")[2])
    arrays = ", ".join(f"{n}[] = {numbers(o)}" for n, o in zip("dabc", i.operands, strict=True))
    return i.whole(f"const int {arrays};", f"mma(w, Number::{i.parts[7]}, {depth}, d, a, b, c);")


def wgmma(i: Instruction) -> str:
    """Done at once: that nobody reads the result, or changes the operands, early is not seen."""
    columns, depth = re.findall(r"\d+", i.parts[4])[1:]  # of m64n8k16
    d, a, b, scale, *signs = i.operands
    if signs[:2] != ["1", "1"]:
        raise Untranslatable("negates an operand")
    in_registers = a.startswith("{")
    major = [bool(int(n)) for n in signs[2:]]
    transposed = [False, *major] if in_registers else major
    first, second = (str(t).lower() for t in (*transposed, False, False)[:2])
    form = f"Number::{i.type}, {columns}, {depth}, {value(scale, 'pred')}, {first}, {second}"

    def descriptor(operand: str) -> str:
        return f"uniform({raw(operand).removesuffix('[l]')}, {i.line})"

    left = f"const int a[] = {numbers(a)};" if in_registers else f"u64 a = {descriptor(a)};"
    return i.whole(
        f"const int d[] = {numbers(d)}, l = 0; {left}",
        f"wgmma(w, {{{form}}}, d, a, {descriptor(b)}, {i.line});",
    )


INT = r"[bsu](8|16|32|64)"
FAMILIES: list[tuple[str, Callable[[Instruction], str]]] = [
    (r"bra(\.uni)?", branch),
    (r"ret|exit", end),
    (r"(bar|barrier)\.sync", barrier),
    (r"bar\.warp\.sync|fence\.proxy\.async(\.\S+)?", nothing),
    (r"wgmma\.(fence|commit_group|wait_group)\.sync\.aligned", nothing),
    (rf"mov\.(pred|f32|f64|{INT})", move),
    (r"cvt\.rn\.b?f16x2\.f32|cvt\.rna\.tf32\.f32", convert),
    (r"cvt\.r[znmp]i\.[su](16|32|64)\.(b?f16|f32|f64)", convert),
    (rf"cvt(\.rn)?\.(b?f16|f32|f64)\.(b?f16|f32|f64|{INT})|cvt\.{INT}\.{INT}", convert),
    (r"(add|sub|mul)(\.rn|\.ftz)*\.(f32|f64)", arithmetic),
    (r"(add|sub|mul)(\.rn)?\.b?f16", arithmetic),
    (r"(add|sub|mul|fma)(\.rn)?\.b?f16x2", pair),
    (r"(add|sub|mul\.lo)\.[su](16|32|64)", arithmetic),
    (r"(mul|mad)\.wide\.[su](16|32)", wide_product),
    (r"mul\.hi\.[su](32|64)", high_product),
    (r"mad\.lo\.[su](16|32|64)|fma\.rn(\.ftz)?\.(f32|f64)", multiply_add),
    (r"div(\.full|\.approx|\.rn)(\.ftz)?\.f(32|64)|(div|rem)\.[su](16|32|64)", divide),
    (r"(and|or|xor)\.(pred|b\d+)", logic),
    (r"not\.(pred|b\d+)", negate),
    (r"sh[lr]\.[bsu](16|32|64)", shift),
    (r"(min|max)(\.ftz|\.NaN)*\.(f32|f64|[su](16|32|64))", extreme),
    (r"(ex2|lg2|rsqrt|sqrt|rcp|tanh)(\.approx|\.rn)?(\.ftz)?\.f32", function),
    (r"(neg|abs)(\.ftz)?\.(f32|f64|s32|s64)", function),
    (rf"selp\.(f32|f64|{INT})", select),
    (rf"setp\.[a-z]+(\.(and|or|xor))?(\.ftz)?\.(b?f16|f32|f64|{INT})", compare),
    (r"bfe\.[su](32|64)|bfi\.b(32|64)|prmt\.b32|lop3\.b32", bits),
    (r"shf\.[lr]\.wrap\.b32", funnel),
    (r"shfl\.sync\.(bfly|idx|up|down)\.b32", shuffle),
    (r"redux\.sync\.(add|min|max|and|or|xor)\.[bsu]32", reduce),
    (rf"ld\.param\.(f32|f64|{INT})", parameter),
    (rf"(ld|st)\.shared(\.v[24])?\.(f32|f64|{INT})", access),
    (rf"ld\.(volatile\.)?global(\.nc|\.cg|\.ca)?(\.v[24])?\.(f32|f64|{INT})", access),
    (rf"ld\.global\.gpu\.(acquire|relaxed)\.{INT}", access),
    (rf"ld\.(acquire|relaxed)\.gpu\.global\.{INT}", access),
    (rf"st\.global(\.v[24])?\.(f32|f64|{INT})", access),
    (r"atom\.global\.gpu\.(relaxed|acquire|release|acq_rel)\.add\.[su]32", atomic),
    (r"(ld|st)matrix\.sync\.aligned\.m8n8\.x[124](\.trans)?\.shared\.b16", matrix_move),
    (r"mma\.sync\.aligned\.m16n8k16\.row\.col\.f32\.(bf16|f16)\.(bf16|f16)\.f32", mma),
    (r"mma\.sync\.aligned\.m16n8k[48]\.row\.col\.f32\.tf32\.tf32\.f32", mma),
    (r"mma\.sync\.aligned\.m16n8k8\.row\.col\.f32\.(bf16|f16)\.(bf16|f16)\.f32", mma),
    (r"wgmma\.mma_async\.sync\.aligned\.m64n\d+k16\.f32\.(bf16|f16)\.(bf16|f16)", wgmma),
    (r"wgmma\.mma_async\.sync\.aligned\.m64n\d+k8\.f32\.tf32\.tf32", wgmma),
]
"""What the machine has: names of instructions, and what makes C++ of them."""


def statement(text: str, line: int) -> str:
    """C++ of one instruction.

    Raises:
        Untranslatable: the machine has no such instruction.
    """
    found = re.fullmatch(r"(?:@(!?)(%p\d+)\s+)?([\w.:]+)\s*(.*)", text, re.S)
    if found:
        guard = found[1] + raw(found[2]) if found[2] else ""
        name = found[3].replace("::cta", "")
        instruction = Instruction(name, split(found[4]), guard, line)
        for pattern, family in FAMILIES:
            if re.fullmatch(pattern, name):
                try:
                    return family(instruction)
                except Untranslatable as error:
                    raise Untranslatable(f"line {line} of the PTX, {text!r}, {error}") from None
    raise Untranslatable(f"line {line} of the PTX: no instruction {text!r}")


def _count(ptx: str, prefix: str) -> int:
    declared = re.findall(rf"\.reg \.(\w+)\s+%{prefix}<(\d+)>", ptx)
    if any(kind != DECLARED[prefix] for kind, _ in declared):
        raise Untranslatable(f"registers %{prefix} are not of type {DECLARED[prefix]}")
    return max((int(count) for _, count in declared), default=1)


def translate(ptx: str) -> str:
    """C++ of the one kernel of a module.

    Raises:
        Untranslatable: what the machine has not, and where it stands.
    """
    unknown = set(re.findall(r"\.reg \.\w+\s+%([a-z]+)<", ptx)) - set(FILES)
    if unknown:
        raise Untranslatable(f"registers {sorted(unknown)}")
    start = ptx.index("\n{", ptx.index(".visible .entry")) + 2
    code, first = ptx[start : ptx.index("\n}", start)], ptx[:start].count("\n") + 1
    lines = [
        '#include "machine.hpp"',
        f"const int COUNTS[4] = {{{', '.join(str(_count(ptx, prefix)) for prefix in FILES)}}};",
        "void step(Warp& w) {",
        "switch (w.resume) {",
        "case 0:",
    ]
    for number, text in enumerate(code.split("\n"), first):
        text = text.partition("//")[0].strip()
        if label := re.fullmatch(r"\$(\w+):", text):
            lines.append(f"{label[1]}:;")
        elif text and text not in "{}" and not text.startswith("."):
            lines += [statement(one.strip(), number) for one in text.split(";") if one.strip()]
    return "\n".join([*lines, "}", "w.state = State::done;", "}", ""])
