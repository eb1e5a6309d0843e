"""One layer of linear attention, learned exactly from examples.

    y = sum_h V_h Z Z^T Q_h z_n          Z [d, n], z_n its last column, V_h and Q_h [d, d]

has no softmax, no scale and no mask. With G = Z Z^T it is linear in psi = d^2 (d + 1) / 2
features of third order,

    y_a = sum_{j <= k, l} p_a[jk, l] G_jk z_n[l]
    p_a[jk, l] = sum_h V_h[a, j] Q_h[k, l] + V_h[a, k] Q_h[j, l]   (j < k; half of it for j = k)

so least squares finds p, and a singular value decomposition finds heads that have it.
Only p is a property of the function: V, Q and the number of heads are not.

After "Learning Linear Attention in Polynomial Time" (Yau et al. 2024, arXiv 2410.10101), with
no code of theirs. NumPy in float64. Start at `fit_heads`.
"""

from collections.abc import Iterable, Iterator

import numpy as np

from memoryformer.notation import Float

Examples = Float[np.ndarray, "N d n"]
Heads = Float[np.ndarray, "H d d"]
Vectors = Float[np.ndarray, "N d"]

BLOCK = 4096  # examples worked on at a time


def num_features(width: int) -> int:
    """Return psi = d^2 (d + 1) / 2."""
    return width * width * (width + 1) // 2


def features(Z: Examples) -> Float[np.ndarray, "N psi"]:
    """Return G_jk z_n[l] of every example, jk over the pairs j <= k, then l."""
    Z = np.asarray(Z, np.float64)
    return features_of(np.einsum("Njn,Nkn->Njk", Z, Z), Z[..., -1])


def features_of(
    G: Float[np.ndarray, "N d d"], queries: Vectors
) -> Float[np.ndarray, "N psi"]:
    """Return the same from G = Z Z^T and z_n."""
    pairs = np.triu_indices(G.shape[-1])
    products = np.einsum("Np,Nl->Npl", G[:, *pairs], queries)
    return products.reshape(len(products), -1)


def certificate(Z: Examples) -> float:
    """Return the smallest eigenvalue of (1 / N) sum H H^T, H the features of an example.

    Above 0, all layers with the least error on these examples are one function: a layer whose
    mean square error exceeds the least by e differs from it at Z by at most
    sqrt(e / certificate) |Z|^3. At 0 (exactly 0 with fewer examples than features), other
    functions fit as well. It speaks of layers that can reach the least error, of d^2 heads.
    """
    return float(eigenvalues(_blocks(_examples(Z)))[0][0])


def eigenvalues(
    blocks: Iterable[Float[np.ndarray, "n M"]],
) -> tuple[Float[np.ndarray, " M"], int]:
    """Return the ascending eigenvalues of the second moment of features, and N.

    Squares of singular values: what is 0 comes out below 1e-25 of the largest, where an
    eigenvalue of the moment itself would be lost in 1e-16 of it. blocks: rows, some at a time.
    """
    counted = 0

    def counting():
        nonlocal counted
        for block in blocks:
            counted += len(block)
            yield block

    R = triangle(counting())
    values = np.zeros(R.shape[1])  # those stay 0 for which there are too few examples
    values[-len(R) :] = np.linalg.svd(R, compute_uv=False)[::-1]
    return values**2 / counted, counted


def fit_heads(Z: Examples, Y: Vectors) -> tuple[Heads, Heads]:
    """Return heads (V, Q) whose layer has the least square error on examples.

    No layer of any number of heads has less. At most d^2 heads; the p of least norm where the
    examples leave a choice. The function is what is found: compare `predict` or `invariants`
    with others, never V, Q or the number of heads. Raises ValueError for shapes that do not fit.
    """
    Z = _examples(Z)
    if Y.shape != Z.shape[:2]:
        raise ValueError(f"Y {Y.shape}: expected {Z.shape[:2]}, a vector per example.")
    return decompose(least_squares(Z, Y))


def least_squares(Z: Examples, Y: Vectors) -> Float[np.ndarray, "d psi"]:
    """Return the p of least square error, and of least norm among those."""
    blocks = (
        np.concatenate([H, Y[start : start + BLOCK]], axis=1)
        for start, H in zip(range(0, len(Z), BLOCK), _blocks(Z), strict=True)
    )
    R = triangle(blocks)
    psi = num_features(Z.shape[1])
    return np.linalg.lstsq(R[:, :psi], R[:, psi:], rcond=None)[0].T


def decompose(p: Float[np.ndarray, "d psi"]) -> tuple[Heads, Heads]:
    """Return heads (V, Q) with invariants p.

    W = sum_h vec(V_h) vec(Q_h)^T has these p where W_aj,kl + W_ak,jl = p_a[jk, l]. Taken is the
    W that is symmetric in j and k; each of its singular vectors is a head.
    """
    width = len(p)
    j, k = np.triu_indices(width)
    W = np.zeros((width, width, width, width))  # [a, j, k, l]
    half = p.reshape(width, len(j), width) / np.where(j == k, 1, 2)[:, None]
    W[:, j, k] = W[:, k, j] = half
    left, values, right = np.linalg.svd(W.reshape(width**2, width**2))
    kept = values > width**2 * np.finfo(float).eps * values[0]
    scale = np.sqrt(values[kept])
    V = (left[:, kept] * scale).T.reshape(-1, width, width)
    Q = (right[kept] * scale[:, None]).reshape(-1, width, width)
    return V, Q


def predict(V: Heads, Q: Heads, Z: Examples) -> Vectors:
    """Return sum_h V_h Z Z^T Q_h z_n of every example: [N, d]."""
    read = np.einsum("Njn,Nkn,hkl,Nl->Nhj", Z, Z, Q, Z[..., -1], optimize=True)
    return np.einsum("haj,Nhj->Na", V, read)


def invariants(V: Heads, Q: Heads) -> Float[np.ndarray, "d psi"]:
    """Return p, the same for all heads that compute the same function."""
    W = np.einsum("haj,hkl->ajkl", V, Q)
    j, k = np.triu_indices(V.shape[-1])
    p = (W[:, j, k] + W[:, k, j]) / np.where(j == k, 2, 1)[:, None]
    return p.reshape(len(p), -1)


def distance(first: tuple[Heads, Heads], second: tuple[Heads, Heads]) -> float:
    """Return |p - p'|, the Frobenius norm; 0 for two layers that are one function."""
    return float(np.linalg.norm(invariants(*first) - invariants(*second)))


def _examples(Z):
    if Z.ndim != 3 or not Z.size:
        raise ValueError(f"Z {Z.shape}: expected [N, d, n], none of them 0.")
    return np.asarray(Z, np.float64)


def _blocks(Z: Examples) -> Iterator[Float[np.ndarray, "n psi"]]:
    """Features, a block of examples at a time."""
    for start in range(0, len(Z), BLOCK):
        yield features(Z[start : start + BLOCK])


def triangle(blocks: Iterable[Float[np.ndarray, "n M"]]) -> Float[np.ndarray, "m M"]:
    """Return the R of the QR decomposition of blocks of rows: R^T R = sum x x^T, m <= M."""
    waiting: list[np.ndarray] = []
    for block in blocks:
        waiting.append(block)
        # A decomposition costs the same for one new row and for M of them.
        if sum(map(len, waiting)) >= 2 * block.shape[1]:
            waiting = [_reduced(waiting)]
    if not waiting:
        raise ValueError("no examples.")
    return _reduced(waiting)


def _reduced(blocks):
    return np.asarray(np.linalg.qr(np.concatenate(blocks), mode="r"))
