"""What computes a product or reads a row, and what that costs in pJ and ns.

    Memory     weights lie in a memory and are read; products are digital
    Crossbar   a crossbar from its parts: converters, shifts, additions
    Chip       a measured chip: so much energy a multiply-add

A crossbar of R rows and R columns, cells of b_c bits, weights of b_w and inputs of b_i bits that
come bit by bit (D inputs, F outputs, F' = F b_w / b_c columns of cells):

    conversions   F' ceil(D / R) b_i     analog to digital, each with a shift and an addition
    drives        D ceil(F' / R) b_i     digital to analog

Tables [K, C, F] inside of it are a matrix of K C rows of which K are driven: the conversions are
those of D = K C. Not counted: cells, buses, control, leakage. Start at `TECHNOLOGIES`.
"""

import dataclasses
import math

from memoryformer.cim.constants import CONSTANTS

VALUE_BITS = 8  # of weights, activations and caches in digital hardware


@dataclasses.dataclass(frozen=True)
class Work:
    """Energy by what it goes into, pJ for one token; time of it, ns (None: not known)."""

    read: float = 0.0
    arithmetic: float = 0.0
    hashing: float = 0.0
    conversion: float = 0.0
    ns: float | None = 0.0


def pj(name: str) -> float:
    """Return the value of a constant."""
    return CONSTANTS[name].value


def multiply_adds(count: float) -> float:
    """Energy of so many: int8 products, int32 sums; pJ."""
    return count * (pj("int8_mul") + pj("int32_add"))


_ARITHMETIC = ("int8_mul", "int32_add", "int8_add", "fp16_mul", "fp16_add")


@dataclasses.dataclass(frozen=True)
class Memory:
    """Weights in a memory: each is read once for all tokens of a batch."""

    read: str  # the constant of a bit
    rate: str = ""  # bits a ns; '': not known
    weight_bits: int = VALUE_BITS

    @property
    def constants(self) -> tuple[str, ...]:
        """What it is made of."""
        return tuple(name for name in (self.read, self.rate, *_ARITHMETIC) if name)

    @property
    def memory(self) -> "Memory":
        """Itself."""
        return self

    def reading(self, values: float) -> Work:
        """Read so many values."""
        bits = values * VALUE_BITS
        ns = bits / pj(self.rate) if self.rate else None
        return Work(read=bits * pj(self.read), ns=ns)

    def product(self, width: int, features: int, batch: int) -> Work:
        """D F multiply-adds; D F values read, shared by the batch."""
        reading = self.reading(width * features / batch)
        return dataclasses.replace(reading, arithmetic=multiply_adds(width * features))


EDRAM = Memory("edram_read", "edram_rate")


@dataclasses.dataclass(frozen=True)
class Crossbar:
    """ISAAC's: cells of 2 bits, inputs bit by bit, an 8-bit converter."""

    weight_bits: int = 8
    input_bits: int = 8

    @property
    def constants(self) -> tuple[str, ...]:
        """What it is made of."""
        parts = ("adc_8b", "dac_1b", "shift_add", "rows", "cell_bits", "cycle")
        return (*(f"isaac_{part}" for part in parts), *EDRAM.constants)

    @property
    def memory(self) -> Memory:
        """eDRAM, as in ISAAC's tiles."""
        return EDRAM

    def product(self, width: int, features: int, batch: int) -> Work:
        """All rows are driven."""
        return self._converted(width, features, driven=width)

    def tables(self, num_tables: int, num_buckets: int, features: int) -> Work:
        """Tables as a matrix of K C rows, one of each table driven."""
        return self._converted(num_tables * num_buckets, features, driven=num_tables)

    def _converted(self, rows, features, driven):
        size = pj("isaac_rows")
        columns = features * math.ceil(self.weight_bits / pj("isaac_cell_bits"))
        conversions = columns * math.ceil(rows / size) * self.input_bits
        drives = driven * math.ceil(columns / size) * self.input_bits
        energy = conversions * (pj("isaac_adc_8b") + pj("isaac_shift_add"))
        energy += drives * pj("isaac_dac_1b")
        return Work(conversion=energy, ns=self.input_bits * pj("isaac_cycle"))


@dataclasses.dataclass(frozen=True)
class Chip:
    """A measured chip: energy a multiply-add, and the time of one pass where it is known."""

    multiply_add: str
    weight_bits: int = 8
    rate: str = ""  # TOPS of the whole chip; '': not known

    @property
    def constants(self) -> tuple[str, ...]:
        """What it is made of."""
        whole = (self.rate, "hermes_multiply_adds") if self.rate else ()
        return (self.multiply_add, *whole, *EDRAM.constants)

    @property
    def memory(self) -> Memory:
        """eDRAM beside it."""
        return EDRAM

    def product(self, width: int, features: int, batch: int) -> Work:
        """D F multiply-adds; all cores of a layer at once."""
        ns = None
        if self.rate:  # one pass of the chip: 2 operations each, 1 TOPS is 1000 a ns
            ns = 2 * pj("hermes_multiply_adds") / (1e3 * pj(self.rate))
        return Work(conversion=width * features * pj(self.multiply_add), ns=ns)

    def tables(self, num_tables: int, num_buckets: int, features: int) -> Work:
        """As a dense layer of K C inputs: what a column's converter costs does not depend
        on how many of its rows are driven."""
        return self.product(num_tables * num_buckets, features, 1)


def rows(memory: Memory, sizes: tuple[int, int, int, int], batch: int) -> Work:
    """Read K rows of F values for a token, and add them up by their scores; sizes K, C, F, tau.

    A comparison (an int8 addition) for each of K tau bits, and a fp16 multiply-add for its
    part of the score. Tokens share no rows, but from a batch of C on, reading every table
    whole costs less: so many rows at most are read.
    """
    num_tables, num_buckets, features, code_bits = sizes
    share = min(1.0, num_buckets / batch)
    reading = memory.reading(share * num_tables * features)
    bits = num_tables * code_bits
    hashing = bits * (pj("int8_add") + pj("fp16_mul") + pj("fp16_add"))
    arithmetic = multiply_adds(num_tables * features)
    return dataclasses.replace(reading, arithmetic=arithmetic, hashing=hashing)


TECHNOLOGIES: dict[str, Memory | Crossbar | Chip] = {
    "edram": EDRAM,
    "gain_cell": Memory("gain_cell_read"),
    "sram": Memory("sram_8kb_read"),
    "hbm2": Memory("hbm2_read", "hbm2_rate"),
    "lpddr4": Memory("lpddr4_read", "lpddr4_rate"),
    "dram": Memory("dram_read_low"),
    "dram_high": Memory("dram_read_high"),
    "ddr3": Memory("ddr3_read", "ddr3_rate"),
    "isaac": Crossbar(),
    "isaac_in6": Crossbar(input_bits=6),
    "isaac_in4": Crossbar(input_bits=4),
    "neurram_3_1": Chip("neurram_3_1", 4),
    "neurram_6_4": Chip("neurram_6_4", 4),
    "neurram_8_6": Chip("neurram_8_6", 4),
    "neurram_10_8": Chip("neurram_10_8", 4),
    "hermes_1phase": Chip("hermes_1phase", 8, "hermes_rate_1phase"),
    "hermes_4phase": Chip("hermes_4phase", 8, "hermes_rate_4phase"),
    "colonnade_600mv": Chip("colonnade_600mv"),
    "colonnade_700mv": Chip("colonnade_700mv"),
    "colonnade_800mv": Chip("colonnade_800mv"),
    "jia_850mv": Chip("jia_850mv_8b"),
    "jia_1200mv": Chip("jia_1200mv_8b"),
    "sinangil_low": Chip("sinangil_low", 4),
    "sinangil_high": Chip("sinangil_high", 4),
    "wang_low": Chip("wang_low"),
    "wang_high": Chip("wang_high"),
}
