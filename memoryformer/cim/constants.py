"""Published figures of hardware, each with its unit, its node and where it is from.

Figures of one table are of different chips, years and nodes: they are set side by side, not
scaled to one another. A chip's efficiency counts 2 operations a multiply-add, so that e pJ are
2 / (e TOPS/W). What is ours, an assumption, says so. Start at `CONSTANTS`.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Constant:
    """One figure: its value, its unit, the process it was made in, and its source."""

    value: float
    unit: str
    node: str
    source: str


_CIMLOOP = "CiMLoop's component library"
_ISAAC = f"ISAAC (ISCA 2016), in {_CIMLOOP}"
_HOROWITZ = "Horowitz, ISSCC 2014"
_CACTI = "the CACTI plug-in of Accelergy"
_WAN = f"NeuRRAM (Wan et al., Nature 2022), in {_CIMLOOP}"
_HERMES = "HERMES chip, 64 cores of 256 x 256; 2 operations a multiply-add"
_OURS = "ours, an assumption"


def _tops(tops_per_watt: float, node: str, source: str) -> Constant:
    """pJ of a multiply-add from an efficiency, at 2 operations each."""
    return Constant(2 / tops_per_watt, "pJ/multiply-add", node, source)


CONSTANTS = {
    # A crossbar from its parts.
    "isaac_adc_8b": Constant(1.667, "pJ/conversion", "32 nm", _ISAAC),
    "isaac_dac_1b": Constant(0.41667, "pJ/conversion", "32 nm", _ISAAC),
    "isaac_shift_add": Constant(0.021, "pJ/conversion", "32 nm", _ISAAC),
    "isaac_rows": Constant(128, "rows and columns", "32 nm", _ISAAC),
    "isaac_cell_bits": Constant(2, "bit/cell", "32 nm", _ISAAC),
    "isaac_cycle": Constant(100, "ns/input bit", "32 nm", _ISAAC),
    "isaac_bus": Constant(0.054, "pJ/bit", "32 nm", _ISAAC),
    "isaac_router": Constant(20.74, "pJ/256 bit", "32 nm", _ISAAC),
    "adc_4b": Constant(0.226, "pJ/conversion", "32 nm", f"FORMS, in {_CIMLOOP}"),
    "adc_9b": Constant(2.58, "pJ/conversion", "32 nm", f"Newton, in {_CIMLOOP}"),
    # Memories.
    "edram_read": Constant(0.08, "pJ/bit", "32 nm", _ISAAC),
    "gain_cell_read": Constant(
        2642 / 1024,
        "pJ/bit",
        "16 nm",
        "RAAAM's gain cells, 1 Mb, 2642 pJ for 1024 bit, in the hwcomponents library",
    ),
    "sram_8kb_read": Constant(10 / 64, "pJ/bit", "45 nm", f"{_HOROWITZ}: 10 pJ/64 bit"),
    "dram_read_low": Constant(
        1300 / 64, "pJ/bit", "45 nm", f"{_HOROWITZ}: 1300 pJ/64 bit, the low end"
    ),
    "dram_read_high": Constant(
        2600 / 64, "pJ/bit", "45 nm", f"{_HOROWITZ}: 2600 pJ/64 bit, the high end"
    ),
    "lpddr4_read": Constant(8, "pJ/bit", "not given", _CACTI),
    "hbm2_read": Constant(3.9, "pJ/bit", "not given", _CACTI),
    "ddr3_read": Constant(70, "pJ/bit", "not given", _CACTI),
    # Digital arithmetic.
    "int8_add": Constant(0.03, "pJ", "45 nm", _HOROWITZ),
    "int8_mul": Constant(0.2, "pJ", "45 nm", _HOROWITZ),
    "int32_add": Constant(0.1, "pJ", "45 nm", _HOROWITZ),
    "int32_mul": Constant(3.1, "pJ", "45 nm", _HOROWITZ),
    "fp16_add": Constant(0.4, "pJ", "45 nm", _HOROWITZ),
    "fp16_mul": Constant(1.1, "pJ", "45 nm", _HOROWITZ),
    "fp32_add": Constant(0.9, "pJ", "45 nm", _HOROWITZ),
    "fp32_mul": Constant(3.7, "pJ", "45 nm", _HOROWITZ),
    # Whole chips, at (output, input) bits.
    "neurram_3_1": _tops(43.1, "130 nm", f"{_WAN}: 43.1 TOPS/W, 4-bit weights"),
    "neurram_6_4": _tops(15.95, "130 nm", f"{_WAN}: 15.95 TOPS/W, 4-bit weights"),
    "neurram_8_6": _tops(8.26, "130 nm", f"{_WAN}: 8.26 TOPS/W, 4-bit weights"),
    "neurram_10_8": _tops(6.44, "130 nm", f"{_WAN}: 6.44 TOPS/W, 4-bit weights"),
    "hermes_1phase": _tops(9.76, "14 nm", f"{_HERMES}: 9.76 TOPS/W, one phase"),
    "hermes_4phase": _tops(2.48, "14 nm", f"{_HERMES}: 2.48 TOPS/W, four phases"),
    "hermes_rate_1phase": Constant(63.1, "TOPS", "14 nm", f"{_HERMES}, one phase"),
    "hermes_rate_4phase": Constant(16.1, "TOPS", "14 nm", f"{_HERMES}, four phases"),
    "hermes_multiply_adds": Constant(64 * 256 * 256, "multiply-adds", "14 nm", _HERMES),
    "colonnade_600mv": Constant(
        0.292, "pJ/multiply-add", "65 nm", f"Colonnade at .6 V, in {_CIMLOOP}"
    ),
    "colonnade_700mv": Constant(
        0.725, "pJ/multiply-add", "65 nm", f"Colonnade at .7 V, in {_CIMLOOP}"
    ),
    "colonnade_800mv": Constant(
        1.170, "pJ/multiply-add", "65 nm", f"Colonnade at .8 V, in {_CIMLOOP}"
    ),
    # One-bit operations: a product of 8 by 8 bits takes 64 of them.
    "jia_850mv_8b": Constant(
        64 * 2 / 400,
        "pJ/multiply-add",
        "65 nm",
        f"Jia, 400 TOPS/W of 1 x 1 bit at .85 V, times 8 x 8, in {_CIMLOOP}",
    ),
    "jia_1200mv_8b": Constant(
        64 * 2 / 192,
        "pJ/multiply-add",
        "65 nm",
        f"Jia, 192 TOPS/W of 1 x 1 bit at 1.2 V, times 8 x 8, in {_CIMLOOP}",
    ),
    "sinangil_low": _tops(262, "7 nm", f"Sinangil, 4 bits, 262 TOPS/W, in {_CIMLOOP}"),
    "sinangil_high": _tops(610, "7 nm", f"Sinangil, 4 bits, 610 TOPS/W, in {_CIMLOOP}"),
    "wang_low": _tops(15.5, "22 nm", f"Wang, 8 bits, 15.5 TOPS/W, in {_CIMLOOP}"),
    "wang_high": _tops(32.2, "22 nm", f"Wang, 8 bits, 32.2 TOPS/W, in {_CIMLOOP}"),
    # Of ours: what no source above says.
    "edram_rate": Constant(
        32 * 1024 / 10, "bit/ns", "-", f"{_OURS}: 32 banks, a word of 1024 bit in 10 ns"
    ),
    "lpddr4_rate": Constant(
        64 * 3.2, "bit/ns", "-", f"{_OURS}: 64 lines of 3.2 Gb/s, 25.6 GB/s"
    ),
    "hbm2_rate": Constant(
        1024 * 2.0, "bit/ns", "-", f"{_OURS}: one stack, 1024 lines of 2 Gb/s"
    ),
    "ddr3_rate": Constant(
        64 * 1.6, "bit/ns", "-", f"{_OURS}: 64 lines of 1.6 Gb/s, 12.8 GB/s"
    ),
    "vector_operations": Constant(
        4, "fp16 multiply-adds/value", "-", f"{_OURS}: of a norm or a softmax"
    ),
}
