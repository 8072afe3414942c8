import pytest

from research.runs import chain, param, product, zipped


def test_product_varies_the_last_fastest():
    sweep = product(param("rank", 1, 2), param("seed", 0, 1))
    assert sweep == [
        {"rank": 1, "seed": 0},
        {"rank": 1, "seed": 1},
        {"rank": 2, "seed": 0},
        {"rank": 2, "seed": 1},
    ]


def test_zipped_pairs_and_chain_concatenates():
    paired = zipped(param("rank", 1, 2), param("lr", 0.1, 0.2))
    assert paired == [{"rank": 1, "lr": 0.1}, {"rank": 2, "lr": 0.2}]
    assert chain(paired, [{"rank": 4}]) == [*paired, {"rank": 4}]
    assert product() == [{}]


def test_clashes_and_unequal_lengths_are_errors():
    with pytest.raises(ValueError, match="seed"):
        product(param("seed", 0), param("seed", 1))
    with pytest.raises(ValueError, match=r"\[1, 2\]"):
        zipped(param("a", 0), param("b", 1, 2))
    with pytest.raises(ValueError, match="at least one"):
        param("a")
