"""The spectral radius of a sparse matrix, deterministic and in seconds, where dense eigenvalues take minutes."""

from __future__ import annotations

from archzoo.kernels._numpy import np

_DENSE = 300  # neurons, up to which all eigenvalues are computed
_STEP, _MOST = 50, 600  # vectors by which the Krylov space grows, and at most
_ACCURACY = 1e-6  # residual of the largest Ritz pair, relative to its value


def spectral_radius(pre: np.ndarray, post: np.ndarray, weight: np.ndarray, total: int) -> float:
    """The largest magnitude of an eigenvalue of the matrix with these entries; 0 if it is nilpotent by its pattern.

    Arnoldi's method with a fixed start vector; each vector is made orthogonal to the others twice, or copies of the
    found eigenvalues come up. Neurons that lie on no cycle have no part in the eigenvalues but 0, and are left out.

    Args:
        pre: Row of each entry.
        post: Column of each entry.
        weight: The entries, float64.
        total: Rows and columns.

    Raises:
        ArithmeticError: If the space grows to 600 vectors without an accuracy of 1e-3.
    """
    pre, post, weight, total = _cyclic(pre, post, weight, total)
    if not total:
        return 0.0
    if total <= _DENSE:
        matrix = np.zeros((total, total))
        matrix[pre, post] = weight
        return float(np.abs(np.linalg.eigvals(matrix)).max())
    return _arnoldi(_Product(pre, post, weight, total), total)


def _cyclic(
    pre: np.ndarray, post: np.ndarray, weight: np.ndarray, total: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """The same without neurons that have no input, or no output, among those that are left."""
    while True:
        stay = np.zeros(total, bool)
        stay[np.intersect1d(pre, post)] = True
        keep = stay[pre] & stay[post]
        number = np.cumsum(stay) - 1
        pre, post, weight = number[pre[keep]], number[post[keep]], weight[keep]
        if stay.all():
            return pre, post, weight, total
        total = int(stay.sum())


class _Product:
    """x -> x W, as sums over the entries of a column, which lie side by side."""

    def __init__(self, pre: np.ndarray, post: np.ndarray, weight: np.ndarray, total: int):
        order = np.argsort(post, kind="stable")
        self.pre, self.weight = pre[order], weight[order]
        self.starts = np.searchsorted(post[order], np.arange(total))  # each column has an entry

    def __call__(self, x: np.ndarray) -> np.ndarray:
        result: np.ndarray = np.add.reduceat(x[self.pre] * self.weight, self.starts)
        return result


def _arnoldi(product: _Product, total: int) -> float:
    most = min(_MOST, total)
    basis, h = np.empty((most + 1, total)), np.zeros((most + 1, most))
    start = np.random.default_rng(0).standard_normal(total)
    basis[0] = start / np.linalg.norm(start)
    radius, residual = 0.0, np.inf
    for k in range(most):
        vector = product(basis[k])
        before = np.linalg.norm(vector)
        for _ in range(2):
            along = basis[: k + 1] @ vector
            vector -= along @ basis[: k + 1]
            h[: k + 1, k] += along
        h[k + 1, k] = np.linalg.norm(vector)
        ended = h[k + 1, k] <= 1e-13 * before  # the space is invariant: its eigenvalues are the matrix's
        if ended or (k + 1) % _STEP == 0 or k + 1 == most:
            values, vectors = np.linalg.eig(h[: k + 1, : k + 1])
            largest = int(np.abs(values).argmax())
            radius = float(np.abs(values[largest]))
            residual = 0.0 if ended else float(h[k + 1, k] * np.abs(vectors[-1, largest]))
            if residual <= _ACCURACY * radius:
                return radius
        basis[k + 1] = vector / h[k + 1, k]
    if residual > 1e-3 * radius:
        raise ArithmeticError(
            f"the spectral radius of {total} neurons on cycles is not found: {radius:g} has a residual of {residual:g}"
        )
    return radius
