"The closed form against matrices on any basis, counts against grids, nulls at their level, files that are damaged."
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import stats

from neurocodec.core.run import UserError
from neurocodec.resonance import planes as R


@settings(max_examples=40, deadline=None)
@given(st.integers(3, 20), st.integers(2, 4), st.floats(0, 3), st.floats(.05, 20), st.integers(0, 9999))
def test_closed_form_is_the_rotation(d, m, shared, length, seed):
    "Any number of directions, oblique by a shared part, of any length, in both orders."
    rng = np.random.default_rng(seed)
    v = (rng.normal(size=(m, d)) + shared * rng.normal(size=d)) * length
    p = R.planes(R.Basis(v, tuple("abcd"[:m])), "PERM")
    assume(np.abs(p.cos_P).max() < 1 - 1e-9)
    x, theta = rng.normal(size=(30, d)), np.linspace(0, 2 * np.pi, 13)
    rho, psi = R.project(x, p)
    for k, (i, j) in enumerate(p.pair_P2):
        closed = np.linalg.norm(v[i]) * rho[k] * np.cos(theta[:, None] + psi[k])
        assert np.abs(closed - R.brute_force(x, v[i], v[j], theta)).max() < 1e-10 * max(1, np.linalg.norm(v[i]))


@pytest.mark.parametrize("s", [1e-3, 1e-4, 1e-5])
@pytest.mark.parametrize("side", [1, -1])
def test_nearly_collinear_directions_keep_ten_digits(s, side):
    rng, theta = np.random.default_rng(0), np.linspace(0, 2 * np.pi, 13)
    for _ in range(10):
        first, other = np.linalg.qr(rng.normal(size=(20, 2)))[0].T
        v, x = np.stack([first, side * (np.sqrt(1 - s**2) * first + s * other)]), rng.normal(size=(30, 20))
        rho, psi = R.project(x, R.planes(R.Basis(v, ("a", "b"))))
        assert np.abs(rho[0] * np.cos(theta[:, None] + psi[0]) - R.brute_force(x, *v, theta)).max() < 1e-10


def test_vectors_of_another_hook_point_are_refused():
    x, p, keys = np.random.default_rng(0).normal(size=(5, 6)), R.planes(R.one_hot([0, 1], 6, "blocks.11.hook_resid_post")), list("abcde")
    for f in (R.project, R.srm_table, lambda x, p, hook: R.reading(x, p, keys, hook)):
        with pytest.raises(UserError, match="vectors of blocks.5.hook_resid_post in a basis of blocks.11"): f(x, p, hook="blocks.5.hook_resid_post")
        f(x, p, hook="blocks.11.hook_resid_post"); f(x, p, hook="")
    R.project(x, R.planes(R.one_hot([0, 1], 6)), "blocks.5.hook_resid_post")  # a basis that does not know where it belongs


def test_the_suites_table_is_counted():
    rng = np.random.default_rng(4)
    x, p = rng.normal(size=(40, 7)), R.planes(R.random_basis(3, 7, 1))
    t, (rho, psi) = R.srm_table(x, p, (0.2, 0.6), 24, True), R.project(x, p)
    S_KPN = rho * np.cos(np.radians(t.angle_deg.to_numpy())[:, None, None] - psi)
    assert t.columns.tolist() == ["angle_deg", "mean_similarity", "count_thresh_0.2", "signed_count_thresh_0.2", "count_thresh_0.6", "signed_count_thresh_0.6", "planes_averaged"]
    np.testing.assert_allclose(t.mean_similarity, S_KPN.mean((1, 2)), atol=1e-12)
    for eps in (.2, .6):
        np.testing.assert_allclose(t[f"count_thresh_{eps}"], (S_KPN >= eps).sum(2).mean(1))
        np.testing.assert_allclose(t[f"signed_count_thresh_{eps}"], ((S_KPN >= eps).sum(2) - (S_KPN <= -eps).sum(2)).mean(1))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 60), st.floats(-1, 1), st.integers(0, 9999))
def test_arcs_are_the_grid(n, eps, seed):
    rng = np.random.default_rng(seed)
    rho, psi, theta = rng.random(n) ** 2, rng.uniform(-9, 9, n), rng.uniform(-7, 14, 80)
    S = rho[:, None] * np.cos(theta - psi[:, None])
    sure = (np.abs(S - eps) > 1e-9).all(0)
    c = R.cone(rho, psi, eps)
    np.testing.assert_array_equal(c.at(theta)[sure], (S >= eps).sum(0)[sure])
    fine = np.linspace(0, 2 * np.pi, 4001)[:-1]
    assert abs(c.mean - c.at(fine).mean()) < .02 * n and c.peak[1] >= c.at(fine).max()


def test_zero_vectors_and_length_do_not_matter():
    rng = np.random.default_rng(0)
    x, p = rng.normal(size=(20, 8)), R.planes(R.random_basis(3, 8))
    a, b = R.project(x, p), R.project(x * rng.uniform(.1, 9, (20, 1)), p)
    np.testing.assert_allclose(a.rho_PN, b.rho_PN); np.testing.assert_allclose(a.psi_PN, b.psi_PN)
    assert (R.project(np.zeros((2, 8)), p).rho_PN == 0).all()
    assert R.spotlight(np.zeros((2, 8)), p, .5).value_PK.max() == 0


def test_p_values_of_rho_are_uniform_on_isotropic_data():
    for d in (3, 16, 300):
        x = np.random.default_rng(d).normal(size=(4000, d))
        assert stats.kstest(R.rho_chance(R.project(x, R.planes(R.random_basis(2, d, 5))).rho_PN[0], d), "uniform").pvalue > 1e-3


def test_signed_share_is_half_a_turn_of_itself():
    rng = np.random.default_rng(1)
    x, p = rng.normal(size=(50, 6)) + .4, R.planes(R.random_basis(3, 6, 2), "PERM")
    v = R.spotlight(x, p, .3, 40, signed=True).value_PK
    np.testing.assert_allclose(v[:, 20:], -v[:, :20])


def test_comparison_is_symmetric_and_its_level_holds():
    rng, p, keys = np.random.default_rng(2), R.planes(R.random_basis(2, 10, 1)), [f"{i}" for i in range(48)]
    core = {k: f"{int(k) // 4}" for k in keys}
    a, b = (R.reading(rng.normal(size=(48, 10)), p, keys) for _ in range(2))
    there, back = R.compare(a, b, core, 50)[0], R.compare(b, a, core, 50)[0]
    assert there.length.value == pytest.approx(back.length.value) and there.dcapture.value == pytest.approx(-back.dcapture.value) and there.p == pytest.approx(back.p)
    ps = [R.compare(*(R.reading(rng.normal(size=(48, 10)), p, keys) for _ in range(2)), core, 0, 199, s)[0].p for s in range(150)]
    assert np.mean(np.array(ps) <= .05) < .12 and np.mean(np.array(ps) <= .5) > .35


def test_order_of_items_does_not_matter():
    rng, p = np.random.default_rng(3), R.planes(R.random_basis(2, 10, 1))
    x, y, keys = rng.normal(size=(9, 10)), rng.normal(size=(9, 10)), [f"{i}" for i in range(9)]
    mix = rng.permutation(9)
    one, two = R.compare(R.reading(x, p, keys), R.reading(y, p, keys), n_boot=20)[0], R.compare(R.reading(x, p, keys), R.reading(y[mix], p, [keys[i] for i in mix]), n_boot=20)[0]
    assert one == two


def test_digest_of_a_basis_holds_its_hook_and_content(tmp_path):
    b = R.one_hot([1, 2], 6, "blocks.11.mlp.hook_post")
    assert b.digest != R.one_hot([1, 2], 6, "blocks.5.mlp.hook_post").digest != R.one_hot([1, 3], 6, "blocks.5.mlp.hook_post").digest
    R.save_basis(b, tmp_path / "b.safetensors")
    assert R.read_basis(tmp_path / "b.safetensors", b.hook).digest == b.digest
    with pytest.raises(UserError, match="belongs to blocks.11"): R.read_basis(tmp_path / "b.safetensors", "blocks.5.mlp.hook_post")


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=120), st.sampled_from([".npz", ".safetensors"]), st.integers(-1, 400))
def test_damaged_basis_files_are_one_line(tmp_path_factory, data, suffix, cut):
    "Any bytes, and a good file cut anywhere, are refused in one line."
    folder = tmp_path_factory.mktemp("b")
    path = folder / f"b{suffix}"
    if cut >= 0:
        if suffix == ".npz": np.savez(path, basis_1=np.ones(20), basis_2=np.arange(20.))
        else: R.save_basis(R.random_basis(2, 20), path)
        data = path.read_bytes()[:cut]
    path.write_bytes(data)
    try: R.read_basis(path)
    except UserError as e: assert "\n" not in str(e) and f"b{suffix}" in str(e)
    else: raise AssertionError("a damaged file was read")


def test_complex_files_are_refused(tmp_path):
    np.savez(tmp_path / "b.npz", basis_1=np.ones(4), basis_2=np.arange(4) * 1j)
    with pytest.raises(UserError, match="b.npz: basis: directions are complex"): R.read_basis(tmp_path / "b.npz")


def test_pickled_metadata_is_never_opened(tmp_path):
    class Trap:
        def __reduce__(self): return (pytest.fail, ("a pickle was opened",))
    np.savez(tmp_path / "b.npz", basis_1=np.ones(4), basis_2=np.arange(4.), __metadata__=np.array(Trap(), dtype=object))
    assert R.read_basis(tmp_path / "b.npz").names == ("basis_1", "basis_2")


@pytest.mark.parametrize("make, says", [
    (lambda: R.planes(R.Basis([[1., 0, 0], [1 + 1e-9, 0, 0]], ("a", "b"))), "collinear"),
    (lambda: R.Basis([[1., 0, 0], [0, 1, 0]], ("a", "b"), centre_D=[0., 1.]), "a centre of shape"),
    (lambda: R.Basis([[1., 0], [0, 1]], ("a", "b")), "three coordinates or more"),
    (lambda: R.Basis([[1j, 0, 0], [0, 1, 0]], ("a", "b")), "directions are complex"),
    (lambda: R.grey(np.zeros(0), np.zeros(0)), "no vectors"),
    (lambda: R.project(np.full((2, 3), np.nan), R.planes(R.one_hot([0, 1], 3))), "not finite"),
    (lambda: R.spotlight(np.ones((2, 3)), R.planes(R.one_hot([0, 1], 3)), 1.5), "eps = 1.5"),
    (lambda: R.means(np.ones((3, 4)), ["a", "b"]), "2 labels for 3 vectors"),
])
def test_faults_are_one_line(make, says):
    with pytest.raises(UserError, match=says) as e: make()
    assert "\n" not in str(e.value)
