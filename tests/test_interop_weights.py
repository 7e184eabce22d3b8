"""Attributions of the original as .pt files: the same numbers back, units as asked, no code run."""

import pickle
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import coar
from coar.attributions import Attributions
from coar.axes import Axis
from coar.errors import AxisError, CoarError, CoarWarning, OutputError, SettingError, StoreError
from coar.interop import load_weights, save_weights
from coar.regression.statistics import MaskCounts
from tests.refused import refused


def write(path, components=5, columns=3, dtype=torch.float32, seed=0, **changes):
    """A file as run_regression.py writes it."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        "weight": torch.randn(components, columns, generator=generator).to(dtype),
        "bias": torch.randn(columns, generator=generator),
        "lam": torch.rand(columns, generator=generator),
    }
    tensors = {key: changes.get(key, value) for key, value in tensors.items()}
    tensors = {key: value for key, value in tensors.items() if value is not None}
    torch.save(tensors, path)
    return tensors


class TestLoad:
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
    def test_weights_are_transposed_and_otherwise_as_they_are(self, tmp_path, dtype):
        tensors = write(tmp_path / "a.pt", dtype=dtype)
        found = load_weights(tmp_path / "a.pt", standardised_by="none")
        assert found.weights.shape == (3, 5)
        np.testing.assert_array_equal(found.weights, tensors["weight"].T.float().numpy())
        np.testing.assert_array_equal(found.intercept, tensors["bias"].numpy())
        np.testing.assert_array_equal(found.detail("penalty"), tensors["lam"].numpy())
        assert found.provenance["scaling"] == "as in the file: per component kept"

    def test_names_and_axes_can_be_given(self, tmp_path):
        write(tmp_path / "a.pt")
        (tmp_path / "names.txt").write_text("a\nb\nc\n", encoding="utf-8")
        axis = Axis("components", list("vwxyz"), {"model": "m"})
        names = {"components": axis, "columns": tmp_path / "names.txt"}
        found = load_weights(tmp_path / "a.pt", output="margin", standardised_by="none", **names)
        assert found.components == axis
        assert found.columns.names == ("a", "b", "c")
        assert found.output == "margin"
        with refused(AxisError, "5 components", "2 components"):
            load_weights(tmp_path / "a.pt", components=["a", "b"])

    def test_the_output_is_the_one_that_the_axis_names(self, tmp_path):
        write(tmp_path / "a.pt")
        axis = Axis("columns", list("abc"), {"data": "d", "output": "margin"})
        for columns, asked, output in (
            (axis, None, "margin"),
            (axis, "loss", "loss"),
            (list("abc"), None, "output"),
            (None, None, "output"),
            (Axis("columns", list("abc"), {"data": "d"}), None, "output"),
        ):
            options = {"columns": columns, "output": asked, "standardised_by": "none"}
            assert load_weights(tmp_path / "a.pt", **options).output == output

    def test_names_of_no_model_are_refused_with_what_to_do(self, tmp_path):
        write(tmp_path / "a.pt")
        write(tmp_path / "b.pt", seed=1)
        first, second = (load_weights(tmp_path / f"{n}.pt", standardised_by="none") for n in "ab")
        model = Axis("components", first.components.names, {"model": "m"})
        with refused(
            AxisError, "expected: components without weights (experiment)", "columns[OUTPUT] to load_weights"
        ):
            first.components.require_same(model, "attributions", "experiment")
        with refused(AxisError, "a file knows the columns of no model", "to load_weights"):
            first.columns.locate(Axis("columns", list("abc"), {"data": "d"}), "attributions", "experiment")
        with refused(AxisError, "weights differs", "made with this very weights"):  # names would not help
            first.components.require_same(second.components, "attributions", "others")

    def test_older_files_are_read(self, tmp_path):
        tensors = write(tmp_path / "new.pt")
        torch.save(tensors, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
        assert not zipfile.is_zipfile(tmp_path / "old.pt")
        found = load_weights(tmp_path / "old.pt", standardised_by="none")
        np.testing.assert_array_equal(found.weights, tensors["weight"].T.numpy())


class TestStandardised:
    """fast_l1 fits to (mask - mean) / deviation and leaves the weights at that."""

    def fitted(self, tmp_path):
        rng = np.random.default_rng(0)
        masks = rng.random((300, 5)) < [0.9, 0.7, 0.5, 0.95, 1.1]  # the last component is never ablated
        truth = rng.normal(size=(5, 3))
        outputs = masks @ truth + 2.0 + 0.1 * rng.normal(size=(300, 3))
        deviation = masks.std(axis=0)
        scaled = np.where(deviation > 0, (masks - masks.mean(axis=0)) / np.maximum(deviation, 1e-32), 0)
        solved = np.linalg.lstsq(np.c_[scaled, np.ones(300)], outputs, rcond=None)[0]
        write(tmp_path / "a.pt", weight=torch.tensor(solved[:-1]), bias=torch.tensor(solved[-1]))
        return masks, outputs

    def test_counts_of_the_masks_give_predictions_in_output_units(self, tmp_path):
        masks, outputs = self.fitted(tmp_path)
        counts = MaskCounts(len(masks), masks.sum(axis=0))
        found = load_weights(tmp_path / "a.pt", standardised_by=counts)
        plain = np.linalg.lstsq(np.c_[masks, np.ones(300)][:, [0, 1, 2, 3, 5]], outputs, rcond=None)[0]
        np.testing.assert_allclose(found.weights[:, :4], plain[:4].T, rtol=1e-4)
        assert not found.weights[:, 4].any()
        np.testing.assert_allclose(found.predict(masks).mean(axis=0), outputs.mean(axis=0), rtol=1e-6)
        unscaled = load_weights(tmp_path / "a.pt", standardised_by="none")
        assert np.abs(unscaled.predict(masks) - outputs).max() > 0.5

    def test_an_ablation_fraction_stands_for_masks_that_are_not_at_hand(self, tmp_path):
        tensors = write(tmp_path / "a.pt")
        found = load_weights(tmp_path / "a.pt", standardised_by=0.05)
        deviation = (0.05 * 0.95) ** 0.5
        np.testing.assert_allclose(found.weights, tensors["weight"].T.numpy() / deviation, rtol=1e-6)
        kept = np.full(5, 0.95)
        np.testing.assert_allclose(found.weights @ kept + found.intercept, tensors["bias"], rtol=1e-5)

    @pytest.mark.parametrize("bad", [0, 1.0, -0.1, True, "0.1", "None", float("nan")])
    def test_other_fractions_are_refused(self, tmp_path, bad):
        write(tmp_path / "a.pt")
        with refused(SettingError, "standardised_by", "above 0 and below 1"):
            load_weights(tmp_path / "a.pt", standardised_by=bad)

    def test_counts_of_other_masks_are_refused(self, tmp_path):
        write(tmp_path / "a.pt")
        with refused(AxisError, "5 components", "4"):
            load_weights(tmp_path / "a.pt", standardised_by=MaskCounts(10, np.full(4, 5)))


class TestUnits:
    """A file that does not say its units is not believed to have ours."""

    def test_that_are_not_said_are_warned_of_and_asked_for(self, tmp_path):
        write(tmp_path / "a.pt")
        with pytest.warns(CoarWarning, match="(?s)a.pt.*does not say its units.*=ABLATION_FRACTION.*'none'"):
            found = load_weights(tmp_path / "a.pt")
        chosen = load_weights(tmp_path / "a.pt", standardised_by="none")
        np.testing.assert_array_equal(found.weights, chosen.weights)

    def test_that_nobody_knows_are_not_claimed_when_saving(self, tmp_path):
        write(tmp_path / "a.pt")
        with pytest.warns(CoarWarning, match="units"):
            save_weights(load_weights(tmp_path / "a.pt"), tmp_path / "b.pt")
        with pytest.warns(CoarWarning, match=r"b\.pt does not say its units"):
            load_weights(tmp_path / "b.pt")
        for by in (0.1, "none"):
            saved = save_weights(load_weights(tmp_path / "a.pt", standardised_by=by), tmp_path / f"{by}.pt")
            assert torch.load(saved, weights_only=True)["units"] == "per component kept"

    def test_that_the_file_says_are_not_scaled_again(self, tmp_path):
        write(tmp_path / "a.pt")
        made = load_weights(tmp_path / "a.pt", standardised_by=0.1)
        path = save_weights(made, tmp_path / "b.pt")
        for by in (None, "none"):
            np.testing.assert_array_equal(load_weights(path, standardised_by=by).weights, made.weights)
        for by in (0.1, MaskCounts(10, np.full(5, 5))):
            with refused(SettingError, "b.pt", "per component kept", "scaled twice"):
                load_weights(path, standardised_by=by)
        torch.save(torch.load(path, weights_only=True) | {"units": "furlongs"}, tmp_path / "c.pt")
        with refused(StoreError, "c.pt", "furlongs", "per component kept"):
            load_weights(tmp_path / "c.pt")

    def test_the_probability_of_keeping_is_no_ablation_fraction(self, tmp_path):
        write(tmp_path / "a.pt")
        with pytest.warns(CoarWarning, match="95% of the components were ablated.*ablation fraction"):
            load_weights(tmp_path / "a.pt", standardised_by=0.95)
        load_weights(tmp_path / "a.pt", standardised_by=0.5)


class TestNan:
    def write(self, tmp_path):
        weight = torch.randn(5, 4)
        weight[2, 1] = weight[4, 1] = float("nan")
        weight[0, 3] = float("inf")
        return write(tmp_path / "a.pt", columns=4, weight=weight)["weight"]

    def test_is_refused_with_how_many_and_where(self, tmp_path):
        self.write(tmp_path)
        with refused(
            OutputError, "a.pt", "3 weights and 0 biases", "2 of 4 columns", "column 1, component 2"
        ):
            load_weights(tmp_path / "a.pt")
        write(tmp_path / "a.pt", bias=torch.tensor([0.0, 0.0, float("nan")]))
        with refused(OutputError, "0 weights and 1 biases", "column 2, its bias"):
            load_weights(tmp_path / "a.pt")

    def test_is_zero_where_that_was_asked_for(self, tmp_path):
        weight = self.write(tmp_path).T.numpy()
        found = load_weights(tmp_path / "a.pt", nan="zero", standardised_by="none")
        np.testing.assert_array_equal(found.weights, np.where(np.isfinite(weight), weight, 0))
        assert found.provenance["nan"] == "zero"

    def test_drops_columns_where_that_was_asked_for(self, tmp_path):
        weight = self.write(tmp_path).T.numpy()
        found = load_weights(tmp_path / "a.pt", nan="drop", standardised_by="none")
        assert found.columns.names == ("0", "2")
        np.testing.assert_array_equal(found.weights, weight[[0, 2]])
        assert len(found.detail("penalty")) == len(found.intercept) == 2

    def test_everywhere_leaves_nothing_to_keep(self, tmp_path):
        write(tmp_path / "a.pt", weight=torch.full((5, 3), float("nan")))
        with refused(OutputError, "every column"):
            load_weights(tmp_path / "a.pt", nan="drop")
        with refused(SettingError, "refuse, zero or drop", "keep"):
            load_weights(tmp_path / "a.pt", nan="keep")


class TestBadFiles:
    def test_pickled_modules_are_refused_with_the_way_to_convert(self, tmp_path):
        torch.save({"weight": torch.nn.Linear(2, 2), "bias": torch.zeros(2)}, tmp_path / "a.pt")
        with refused(StoreError, "a.pt", "would run code of the file", "weights_only=False", "torch.save"):
            load_weights(tmp_path / "a.pt")

    def test_code_in_a_file_is_not_run(self, tmp_path):
        class Trap:
            def __reduce__(self):
                return (open, (str(tmp_path / "trapped"), "w"))

        torch.save({"weight": Trap()}, tmp_path / "a.pt")
        with refused(StoreError, "would run code of the file"):
            load_weights(tmp_path / "a.pt")
        assert not (tmp_path / "trapped").exists()

    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"weight": None}, ["weight", "bias, lam"]),
            ({"bias": None}, ["weight, lam"]),
            ({"weight": torch.zeros(5)}, ["weight has the wrong shape", "(5,)"]),
            ({"weight": torch.zeros(5, 0)}, ["weight has the wrong shape", "(5, 0)"]),
            ({"bias": torch.zeros(5)}, ["bias has the wrong shape", "(3,)", "(5,)"]),
            ({"lam": torch.zeros(())}, ["lam has the wrong shape", "()"]),
            ({"weight": torch.zeros(5, 3, dtype=torch.int64)}, ["weight", "int64"]),
            ({"weight": torch.zeros(5, 3).to_sparse()}, ["weight", "sparse"]),
            ({"bias": "none"}, ["bias", "str"]),
        ],
    )
    def test_other_contents_are_named(self, tmp_path, changes, words):
        write(tmp_path / "a.pt", **changes)
        with refused(StoreError, "a.pt", *words):
            load_weights(tmp_path / "a.pt")

    def test_a_transposed_file_is_recognised(self, tmp_path):
        write(tmp_path / "a.pt", weight=torch.zeros(3, 5))
        with refused(StoreError, "bias has the wrong shape", "(5,)", "transposed?"):
            load_weights(tmp_path / "a.pt")

    def test_files_of_others_are_told_apart_without_advice_to_run_their_code(self, tmp_path):
        np.savez(tmp_path / "ours.npz", weight=np.zeros(3))
        np.save(tmp_path / "array.npy", np.zeros(3))
        contents = {"text.pt": b"hello world\n", "json.pt": b'{"weight": [1]}', "empty.pt": b""}
        contents["pickle.pt"] = pickle.dumps({"weight": [1.0]})
        for name, content in contents.items():
            (tmp_path / name).write_bytes(content)
        got = {"ours.npz": "weight.npy", "array.npy": "NUMPY", "text.pt": "text", "json.pt": "text"}
        got |= {"empty.pt": "an empty file", "pickle.pt": "a file that begins with"}
        for name, words in got.items():
            with pytest.raises(StoreError, match="is not a torch file") as caught:
                load_weights(tmp_path / name)
            assert name in str(caught.value)
            assert words in caught.value.got
            assert "weights_only" not in str(caught.value)
        with refused(StoreError, "is a folder"):
            load_weights(tmp_path)

    def test_messages_hold_no_control_codes(self, tmp_path):
        torch.save({"weight": np.zeros((5, 3)), "bias": np.zeros(3)}, tmp_path / "a.pt")
        with pytest.raises(StoreError, match="would run code of the file") as caught:
            load_weights(tmp_path / "a.pt")
        assert "_reconstruct" in caught.value.got
        assert all(character.isprintable() or character == "\n" for character in str(caught.value))

    def test_a_lone_tensor_and_no_file_are_refused(self, tmp_path):
        torch.save(torch.zeros(3), tmp_path / "a.pt")
        with refused(StoreError, "holds no attributions", "Tensor"):
            load_weights(tmp_path / "a.pt")
        with refused(StoreError, "missing"):
            load_weights(tmp_path / "b.pt")

    @given(data=st.data())
    def test_damaged_files_are_named_errors(self, tmp_path_factory, data):
        path = tmp_path_factory.mktemp("fuzz") / "a.pt"
        write(path)
        content = bytearray(path.read_bytes())
        for _ in range(data.draw(st.integers(1, 5))):
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
        if data.draw(st.booleans()):
            del content[data.draw(st.integers(0, len(content))) :]
        path.write_bytes(content)
        try:
            found = load_weights(path, nan="zero", standardised_by="none")
        except CoarError:
            return
        assert np.isfinite(found.weights).all()


class TestSave:
    def made(self, seed=0, columns=3, components=5, penalty=True):
        rng = np.random.default_rng(seed)
        axes = (
            Axis("components", [f"c{i}" for i in range(components)], {"model": "m"}),
            Axis("columns", [str(i) for i in range(columns)], {"data": "d"}),
        )
        weights, intercept = rng.normal(size=(columns, components)), rng.normal(size=columns)
        details = {"penalty": rng.random(columns)} if penalty else None
        return Attributions(weights, intercept, *axes, output="margin", details=details)

    @given(
        seed=st.integers(0, 99),
        columns=st.integers(1, 9),
        components=st.integers(1, 9),
        penalty=st.booleans(),
    )
    def test_what_is_saved_is_loaded_bit_by_bit(self, tmp_path_factory, seed, columns, components, penalty):
        folder = tmp_path_factory.mktemp("trip")
        made = self.made(seed, columns, components, penalty)
        save_weights(made, folder / "a.pt")
        found = load_weights(
            folder / "a.pt", components=made.components, columns=made.columns, output="margin"
        )
        np.testing.assert_array_equal(found.weights, made.weights)
        np.testing.assert_array_equal(found.intercept, made.intercept)
        if penalty:
            np.testing.assert_array_equal(found.detail("penalty"), made.detail("penalty"))
        save_weights(found, folder / "b.pt")
        assert (folder / "a.pt").read_bytes() == (folder / "b.pt").read_bytes()

    def test_published_files_come_back_as_they_were(self, tmp_path):
        tensors = write(tmp_path / "a.pt", dtype=torch.float16)
        published = load_weights(tmp_path / "a.pt", standardised_by="none")
        save_weights(published, tmp_path / "b.pt", dtype="float16")
        found = torch.load(tmp_path / "b.pt", weights_only=True)
        assert found["weight"].dtype == torch.float16
        assert all(torch.equal(found[key].to(value.dtype), value) for key, value in tensors.items())

    def test_the_file_is_what_the_originals_notebooks_expect(self, tmp_path):
        made = self.made()
        save_weights(made, tmp_path / "a.pt")
        weights = torch.load(tmp_path / "a.pt", weights_only=True)["weight"].T.float()
        masks = np.random.default_rng(1).random((4, 5)) < 0.5
        by_them = np.stack([weights[:, mask].sum(axis=1).numpy() for mask in masks])
        np.testing.assert_allclose(by_them + made.intercept, made.predict(masks), rtol=1e-5)

    def test_a_fit_goes_there_and_back(self, tmp_path):
        from coar.testing import SubsetMean

        study = coar.Study.create(tmp_path / "s", SubsetMean(), coar.Bernoulli(ablation_fraction=0.3), 90)
        study.run(progress=False)
        made = coar.fit(study)
        axes = {"components": study.components, "columns": study.columns["mean"]}
        found = load_weights(save_weights(made, tmp_path / "a.pt"), output="mean", **axes)
        np.testing.assert_array_equal(found.predict(study.masks[:9]), made.predict(study.masks[:9]))

    def test_what_does_not_fit_into_float16_is_refused(self, tmp_path):
        axes = Axis("components", ["a"], {}), Axis("columns", ["0"], {})
        made = Attributions(np.array([[1e6]]), np.zeros(1), *axes, output="margin")
        with refused(OutputError, "float16", "1000000"):
            save_weights(made, tmp_path / "a.pt", dtype="float16")
        with refused(SettingError, "float32 or float16", "int8"):
            save_weights(made, tmp_path / "a.pt", dtype="int8")
        assert not (tmp_path / "a.pt").exists()

    @pytest.mark.parametrize("name", ["ours.npz", "ours", "ours.safetensors"])
    def test_other_kinds_of_files_are_not_promised(self, tmp_path, name):
        with refused(SettingError, name, "ends in .pt"):
            save_weights(self.made(), tmp_path / name)
        assert not list(tmp_path.iterdir())

    def test_other_attributions_are_not_overwritten(self, tmp_path):
        save_weights(self.made(0), tmp_path / "a.pt")
        save_weights(self.made(0), tmp_path / "a.pt")
        with refused(StoreError, "a.pt", "holds something else"):
            save_weights(self.made(1), tmp_path / "a.pt")
