"""The published tables of costs follow from the formulas that are named after them."""

import pytest

from prunetune.scripts.profiling.published import (
    VICUNA_7B,
    VICUNA_13B,
    adaptive_study_flops,
    fastv_kv_mib,
    fastv_ratio,
    kv_mib,
    vispruner_fastv_flops,
    vispruner_flops,
)

# tokens, share, FLOPs in T and MiB of VisPruner and of FastV, as printed; dense rows have no FastV.
TABLE_6 = [
    (576, 1.00, 8.02, 288.0, None, None),
    (432, 0.75, 6.08, 216.0, 6.20, 220.50),
    (288, 0.50, 4.16, 144.0, 4.40, 153.00),
    (144, 0.25, 2.26, 72.0, 2.62, 85.50),
    (58, 0.10, 1.13, 29.0, 1.57, 45.31),
    (29, 0.05, 0.76, 14.5, 1.22, 31.72),
]
TABLE_7 = [  # its first row is printed a column to the left
    (576, 1.00, 15.28, 450.00, None, None),
    (432, 0.75, 11.50, 337.50, 11.69, 343.13),
    (288, 0.50, 7.76, 225.00, 8.14, 236.25),
    (144, 0.25, 4.05, 112.50, 4.62, 129.38),
    (58, 0.10, 1.86, 45.31, 2.53, 65.70),
    (29, 0.05, 1.12, 22.66, 1.83, 44.19),
]
TABLE_8 = [
    (2880, 1.00, 43.58, 1440.0, None, None),
    (2160, 0.75, 32.35, 1080.0, 33.05, 1102.50),
    (1440, 0.50, 21.66, 720.0, 23.04, 765.00),
    (720, 0.25, 11.51, 360.0, 13.53, 427.50),
    (290, 0.10, 5.71, 145.0, 8.10, 226.56),
    (145, 0.05, 3.80, 72.5, 6.30, 158.59),
]
TABLES = [(VICUNA_7B, 1, TABLE_6), (VICUNA_13B, 1, TABLE_7), (VICUNA_7B, 5, TABLE_8)]
ROWS = [(decoder, crops, *row) for decoder, crops, rows in TABLES for row in rows]


@pytest.mark.parametrize(("decoder", "crops", "tokens", "share", "flops", "mib", "fastv", "fastv_mib"), ROWS)
def test_vispruners_tables_6_to_8(decoder, crops, tokens, share, flops, mib, fastv, fastv_mib):
    assert vispruner_flops(decoder, tokens, crops) / 1e12 == pytest.approx(flops, rel=0.005)
    assert kv_mib(decoder, tokens) == pytest.approx(mib, abs=0.005)  # two decimals are printed
    if fastv is None:
        return
    assert vispruner_fastv_flops(decoder, tokens, share, crops=crops) / 1e12 == pytest.approx(fastv, rel=0.005)


def test_vispruners_computed_figures_of_table_6():
    computed = [8.016, 6.075, 4.156, 2.258, 1.135, 0.758]
    for (tokens, *_), figure in zip(TABLE_6, computed, strict=True):
        assert vispruner_flops(VICUNA_7B, tokens) / 1e12 == pytest.approx(figure, abs=0.0006)


def test_a_token_of_the_7b_llm_takes_half_a_mebibyte():
    assert kv_mib(VICUNA_7B, 1) == 0.5


@pytest.mark.parametrize(("decoder", "rows"), [(VICUNA_7B, TABLE_6), (VICUNA_13B, TABLE_7), (VICUNA_7B, TABLE_8)])
def test_caches_of_the_fastv_rows(decoder, rows):
    for tokens, share, *_, mib in rows[1:]:
        assert fastv_kv_mib(decoder, tokens, share) == pytest.approx(mib, abs=0.0105)  # 44.18 is printed as 44.19


def test_the_adaptive_studys_table_9():
    """3.14 T of 576 tokens are those of 28 or 29 text tokens, 0.48 T of 64 those of 30 or 31: none gives both."""

    def texts(visual, printed):
        counts = {text: adaptive_study_flops(VICUNA_7B, visual, text) / 1e12 for text in range(10, 61)}
        return [text for text, flops in counts.items() if round(flops, 2) == printed]

    assert (texts(576, 3.14), texts(64, 0.48)) == ([28, 29], [30, 31])
    assert adaptive_study_flops(VICUNA_7B, 576, 29) / 1e12 == pytest.approx(3.141, abs=0.0006)
    assert adaptive_study_flops(VICUNA_7B, 64, 31) / 1e12 == pytest.approx(0.481, abs=0.0006)


@pytest.mark.parametrize(("boundary", "left"), [(3, 0.57), (2, 0.55)])
def test_fastvs_ratios(boundary, left):
    """Half of 576 tokens dropped, with 35 of text."""
    assert round(fastv_ratio(VICUNA_7B, 576, 35, boundary, 0.5), 2) == left


def test_table_5_of_vispruner_is_not_about_its_own_tokens():
    """Its rows of 640 and 160 tokens print FLOPs of 720 and 145; its caches are 720 tokens' and 160 tokens'."""
    assert vispruner_flops(VICUNA_7B, 640, 5) / 1e12 == pytest.approx(10.41, abs=0.01)  # 11.5 is printed
    assert round(vispruner_flops(VICUNA_7B, 720, 5) / 1e12, 1) == 11.5
    assert round(vispruner_flops(VICUNA_7B, 145, 5) / 1e12, 1) == 3.8
    assert (kv_mib(VICUNA_7B, 640), kv_mib(VICUNA_7B, 720), kv_mib(VICUNA_7B, 160)) == (320, 360, 80)


def test_what_the_papers_say_of_one_another_and_of_memory():
    """FastV's 380 and 95 MB take four times the tokens in two layers; CrisPrune's 351 MB hold 62 of text."""
    assert [fastv_kv_mib(VICUNA_7B, tokens, 0.25) for tokens in (640, 160)] == [380, 95]
    assert kv_mib(VICUNA_7B, 640 + 62) == 351
    assert kv_mib(VICUNA_13B, 2880 - 320) == 2000  # of the 7,384 MiB that PrismPrune's table 7 has less
