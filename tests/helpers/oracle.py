"""The truth in float64 NumPy: every formula, written without the package.

A block is a label: `labels[k]` is an array of integers of the shape of variable
`k`, and coordinates with one label, also those of different variables, share
one accumulator. Coordinates labelled `PLAIN` have none.
"""

import keras
import numpy as np

PLAIN = -1


def tile_labels(shape, tile, start=0):
    """One label per tile of `shape`, by looking at every coordinate."""
    tile = [n if t is None else t for n, t in zip(shape, tile)]
    seen = {}
    labels = np.zeros(shape, int)
    for index in np.ndindex(*shape):
        corner = tuple(i // t for i, t in zip(index, tile))
        labels[index] = seen.setdefault(corner, start + len(seen))
    return labels


def one_label(shape, label):
    """All of a variable in one block, which others may share."""
    return np.full(shape, label)


class Oracle:
    """Weights, block statistics and momenta, all in float64.

    Args:
        weights: Initial value of each variable.
        labels: Label array of each variable.
        store: What storing a weight does to it, such as rounding.
        store_momentum: What storing the momentum of variable `k` in a step
            `t` does to it.
        **hyper: The hyper-parameters of `update`.
    """

    def __init__(
        self,
        weights,
        labels,
        store=np.float64,
        store_momentum=lambda m, k, t: m,
        **hyper,
    ):
        self.weights = [np.array(w, np.float64) for w in weights]
        self.labels = labels
        self.store = store
        self.store_momentum = store_momentum
        self.hyper = hyper
        self.t = 0
        size = 1 + max(label.max() for label in labels)
        # With some backends, an initializer of Keras rounds it to float32.
        initial = hyper.pop("initial_accumulator_value", 0.0)
        initial = float(keras.initializers.Constant(initial)((), "float64"))
        self.velocity = np.full(size, initial, np.float64)
        self.velocity_hat = np.zeros(size)
        self.average_gradient = np.zeros(size)
        self.momentum = [np.zeros_like(w) for w in self.weights]

    def step(self, gradients, learning_rate):
        """One step; `None` stands for a missing gradient.

        The learning rate is that of all variables, or a list of one for each.
        """
        rates = np.broadcast_to(learning_rate, len(gradients))
        self.t += 1
        present = [k for k, g in enumerate(gradients) if g is not None]
        labels = np.concatenate([self.labels[k].ravel() for k in present])
        seen = [self.seen(k, gradients[k]) for k in present]
        flat = np.concatenate([np.ravel(x) for x in seen])
        flat = flat.astype(np.float64)[labels != PLAIN]
        labels = labels[labels != PLAIN]
        size = len(self.velocity)
        count = np.bincount(labels, minlength=size)
        squares = np.bincount(labels, flat**2, size)
        sums = np.bincount(labels, flat, size)
        for b in np.unique(labels):
            self.accumulate(b, squares[b] / count[b], sums[b] / count[b])
        for k in present:
            g = np.array(gradients[k], np.float64)
            m = self.momentum[k]
            hyper = self.hyper
            if (self.labels[k] == PLAIN).all():
                v, a = np.ones_like(g), np.zeros_like(g)
                hyper = {**hyper, "epsilon": 0.0, "beta_2": 0.0}
            else:
                v, a = self.of_variable(k)
            m, change = self.update(rates[k], g, m, v, a, **hyper)
            self.momentum[k] = np.array(
                self.store_momentum(m, k, self.t), np.float64
            )
            w = self.store(self.weights[k] + change)
            self.weights[k] = np.array(w, np.float64)

    def seen(self, k, g):
        """What is averaged over a block, and its square."""
        return g

    def of_variable(self, k):
        """The velocity in the root and the mean gradient, per coordinate."""
        v = self.velocity_hat if self.hyper.get("amsgrad") else self.velocity
        return v[self.labels[k]], self.average_gradient[self.labels[k]]

    def accumulate(self, b, mean_square, mean):
        decay, weight = self.coefficients(**self.hyper)
        self.velocity[b] = decay * self.velocity[b] + weight * mean_square
        self.velocity_hat[b] = max(self.velocity_hat[b], self.velocity[b])
        self.average_gradient[b] = (
            decay * self.average_gradient[b] + weight * mean
        )


class BlockAdam(Oracle):
    def coefficients(self, beta_2=0.999, **_):
        return beta_2, 1 - beta_2

    def update(
        self, lr, g, m, v, a, beta_1=0.9, beta_2=0.999, epsilon=1e-7, **_
    ):
        m = beta_1 * m + (1 - beta_1) * g
        lr = lr * np.sqrt(1 - beta_2**self.t) / (1 - beta_1**self.t)
        return m, -lr * m / (np.sqrt(v) + epsilon)


class AdamMini(BlockAdam):
    """Divides by the root of the corrected velocity, plus epsilon."""

    def update(
        self, lr, g, m, v, a, beta_1=0.9, beta_2=0.999, epsilon=1e-8, **_
    ):
        m = beta_1 * m + (1 - beta_1) * g
        m_hat = m / (1 - beta_1**self.t)
        v_hat = v / (1 - beta_2**self.t)
        return m, -lr * m_hat / (np.sqrt(v_hat) + epsilon)


class Adalayer(AdamMini):
    """The same step; what is a block is in the labels."""


class SPAM(BlockAdam):
    """As the authors' code has it, but that `v = 0` is no limit."""

    def step(self, gradients, learning_rate):
        since = (self.t + 1) % self.hyper.get("reset_every", 500)
        threshold = self.hyper.get("spike_threshold", 5000.0)
        if since == 0:
            for k, g in enumerate(gradients):
                if g is not None:
                    own = self.labels[k]
                    self.velocity[own[own != PLAIN]] = 0
                    self.momentum[k] = np.zeros_like(self.momentum[k])
        if since >= 20 and threshold:
            gradients = [
                g
                if g is None or (own == PLAIN).all()
                else self.cut(g, threshold * self.velocity[own])
                for g, own in zip(gradients, self.labels)
            ]
        super().step(gradients, learning_rate)

    def cut(self, g, square):
        is_spike = (g**2 > square) & (square > 0)
        self.spikes = getattr(self, "spikes", 0) + is_spike.sum()
        return np.where(is_spike, np.sign(g) * np.sqrt(square), g)

    def update(
        self,
        lr,
        g,
        m,
        v,
        a,
        beta_1=0.9,
        beta_2=0.999,
        epsilon=1e-6,
        reset_every=500,
        reset_warmup=150,
        reset_bias_correction=True,
        **_,
    ):
        n, since = self.t, self.t % reset_every
        if n >= reset_every and reset_bias_correction:
            n = since + 1
        if self.t >= reset_every and since < reset_warmup:
            angle = np.pi * since / (reset_warmup + 1)
            lr = lr * (0.01 + 0.99 * (1 - np.cos(angle)) / 2)
        m = beta_1 * m + (1 - beta_1) * g
        lr = lr * np.sqrt(1 - beta_2**n) / (1 - beta_1**n)
        return m, -lr * m / (np.sqrt(v) + epsilon)


class BlockNadam(BlockAdam):
    """Keras's Nadam: a product over all steps so far, made anew in each."""

    def update(
        self, lr, g, m, v, a, beta_1=0.9, beta_2=0.999, epsilon=1e-7, **_
    ):
        u = beta_1 * (1 - 0.96 ** np.arange(1, self.t + 2) / 2)
        m = beta_1 * m + (1 - beta_1) * g
        look_ahead = u[-1] * m / (1 - np.prod(u))
        look_ahead += (1 - u[-2]) * g / (1 - np.prod(u[:-1]))
        v_hat = v / (1 - beta_2**self.t)
        return m, -lr * look_ahead / (np.sqrt(v_hat) + epsilon)


class AdaBlock(BlockAdam):
    """Block by block, with the matrix of each by its label."""

    def __init__(self, weights, labels, **kwargs):
        super().__init__(weights, labels, **kwargs)
        self.matrices = {}

    def of_variable(self, k):
        self.k = k
        return super().of_variable(k)

    def update(
        self,
        lr,
        g,
        m,
        v,
        a,
        beta_1=0.9,
        beta_2=0.999,
        epsilon=1e-4,
        bounds=None,
        drawn=None,
        **_,
    ):
        plain = super().update(lr, g, m, v, a, beta_1, beta_2, epsilon)
        if beta_2 == epsilon == 0.0:  # Without blocks.
            return plain
        own = self.labels[self.k]
        m, change = plain[0], np.zeros_like(g)
        for label in np.unique(own):
            mine = own == label
            old = self.matrices.get(label, np.zeros((mine.sum(),) * 2))
            new = beta_2 * old + (1 - beta_2) * np.outer(g[mine], g[mine])
            self.matrices[label] = new
            s, q = np.linalg.eigh(new)
            if drawn is not None and not drawn(self.t, self.k):
                s, q = np.diag(new), np.eye(len(new))
            s = np.maximum(s, np.trace(new) / 2**23)
            size = lr * np.sqrt(1 - beta_2**self.t) / (1 - beta_1**self.t)
            size = size / (np.sqrt(s) + epsilon)
            if bounds:
                end, x = bounds[0] * lr, bounds[1] * self.t
                size = np.clip(size, end * (1 - 1 / (x + 1)), end * (1 + 1 / x))
            change[mine] = -q @ (size * (q.T @ m[mine]))
        return m, change


class BCOS(Oracle):
    """Written out in the momentum before the step, as by the authors."""

    def seen(self, k, g):
        beta = self.hyper.get("momentum", 0.9)
        m = self.momentum[k] if self.t > 1 else g
        return np.sqrt(
            (3 * beta**2 - 2 * beta**3) * m**2
            + (1 - beta) ** 2 * np.square(g)
            + 2 * beta * (1 - beta) ** 2 * m * g
        )

    def coefficients(self, **_):
        return 0.0, 1.0

    def update(self, lr, g, m, v, a, momentum=0.9, epsilon=1e-6, **_):
        m = momentum * m + (1 - momentum) * g if self.t > 1 else g
        return m, -lr * m / (np.sqrt(v) + epsilon)


class BAGM(Oracle):
    def coefficients(
        self, accumulator="exponential", beta_2=0.999, power=3.0, **_
    ):
        if accumulator == "polynomial":
            weight = (power + 1) / (self.t + power)
            return 1 - weight, weight
        return beta_2, 1 - beta_2

    def update(
        self,
        lr,
        g,
        m,
        v,
        a,
        momentum=0.9,
        nesterov=True,
        accumulator="exponential",
        beta_2=0.999,
        epsilon=1e-7,
        **_,
    ):
        exponential = accumulator == "exponential"
        correction = 1 - beta_2**self.t if exponential else 1.0
        p = lr * np.sqrt(correction) * g / (np.sqrt(v) + epsilon)
        # Written as by the authors, with the sign of the step in m.
        m = momentum * -m - p
        return -m, momentum * m - p if nesterov else m


class BAG(Oracle):
    def __init__(self, *args, initial_accumulator_value=0.1, **kwargs):
        super().__init__(
            *args,
            initial_accumulator_value=initial_accumulator_value,
            **kwargs,
        )

    def coefficients(self, **_):
        return 1.0, 1.0

    def update(self, lr, g, m, v, a, epsilon=1e-7, **_):
        return m, -lr * g / np.sqrt(v + epsilon)


class BlockRMSprop(Oracle):
    def coefficients(self, rho=0.9, **_):
        return rho, 1 - rho

    def update(
        self, lr, g, m, v, a, momentum=0.0, epsilon=1e-7, centered=False, **_
    ):
        variance = v - a**2 if centered else v
        m = momentum * m + lr * g / np.sqrt(variance + epsilon)
        return m, -m


class BlockMuon(Oracle):
    """Muon with blocks.

    Args:
        matrices: For each variable, the positions of the entries of its
            matrices in the raveled variable, of shape `(matrices, rows,
            columns)`; `None` for one that is no hidden matrix.
    """

    def __init__(self, weights, labels, matrices, **kwargs):
        super().__init__(weights, labels, **kwargs)
        self.matrices = matrices

    def coefficients(self, beta_2=0.95, **_):
        return beta_2, 1 - beta_2

    def step(self, gradients, learning_rate):
        mu = self.hyper.get("momentum", 0.95)
        directions = list(gradients)
        self.moved = {}
        for k, g in enumerate(gradients):
            if g is not None and self.matrices[k] is not None:
                g = np.array(g, np.float64)
                m = self.moved[k] = mu * self.momentum[k] + (1 - mu) * g
                directions[k] = self.orthogonal(k, mu * m + (1 - mu) * g)
        super().step(directions, learning_rate)

    def orthogonal(self, k, u):
        o = np.zeros(u.size)
        for entries in self.matrices[k]:
            steps = self.hyper.get("ns_steps", 5)
            o[entries] = newton_schulz(u.ravel()[entries], steps)
        return o.reshape(u.shape)

    def of_variable(self, k):
        self.k = k
        return super().of_variable(k)

    def update(
        self, lr, g, m, v, a, momentum=0.95, beta_2=0.95, epsilon=1e-8, **_
    ):
        x = g / (np.sqrt(v) + epsilon)
        if self.matrices[self.k] is None:
            x = np.sqrt(1 - beta_2**self.t) * x
            m = momentum * m + (1 - momentum) * x
            return m, -lr * (momentum * m + (1 - momentum) * x)
        for entries in self.matrices[self.k]:
            part = x.ravel()[entries]
            rms = np.sqrt(np.mean(part**2))
            x.ravel()[entries] = 0.2 * part / rms if rms else 0.0
        return self.moved[self.k], -lr * x


def newton_schulz(u, steps=5):
    """As its authors write it, of one matrix."""
    x = u / (np.linalg.norm(u) + 1e-7)
    if u.shape[0] > u.shape[1]:
        x = x.T
    for _ in range(steps):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.T if u.shape[0] > u.shape[1] else x
