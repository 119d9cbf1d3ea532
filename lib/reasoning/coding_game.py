"""Markov coding games: an agent acts in a Markov decision process and, by its actions, tells a message.

Sokota et al. (arXiv 2107.08295) state the game and solve it by maximum-entropy policies and minimum entropy
coupling; Ebrahimi, Chen and Khisti (arXiv 2410.21666) put a rate limit between the message's source and the agent.
"""

from collections.abc import Callable

import numpy as np

from lib.information import cell_masses, ebim, entropy_bits, minimum_entropy_coupling

MOVES = ((-1, 0), (0, 1), (1, 0), (0, -1))  # north, east, south, west


def noisy_gridworld(
    rows: int = 5,
    columns: int = 6,
    slip: float = 0.05,
    start: tuple[int, int] = (4, 0),
    goal: tuple[int, int] = (0, 5),
    trap: tuple[int, int] | None = (1, 5),
    walls: tuple[tuple[int, int], ...] = ((1, 1), (3, 3)),
    step_reward: float = 0.0,
    discount: float = 0.95,
) -> dict:
    """A grid world as a tabular decision process: four moves, which slip to either side with probability `slip`.

    Reaching the goal pays 1, the trap -1, every step `step_reward`; goal and trap end the episode. A move into a
    wall or over the edge stays where it is.

    Returns:
        `transition` (S, A, S), `reward` (S, A) in expectation over the successor, `arrival` (S,) the reward for
        entering a state, `step_reward`, `terminal` (S,) bool, `start` index, `discount`, `shape` (rows, columns)
        and `walls`. States count the cells row by row, the walls' included.

    Raises:
        ValueError: a cell outside the grid or used twice, or a probability or discount out of range.
    """
    if not 0 <= slip <= 1:
        raise ValueError(f"slip must be a probability, got {slip}")
    if not 0 <= discount < 1:
        raise ValueError(f"discount must be in [0, 1), got {discount}")
    special = [start, goal, *([trap] if trap else []), *walls]
    for row, column in special:
        if not (0 <= row < rows and 0 <= column < columns):
            raise ValueError(f"the cell {(row, column)} is outside the {rows} x {columns} grid")
    if len(set(special)) < len(special):
        raise ValueError(f"start, goal, trap and walls must be different cells, got {special}")
    states = rows * columns
    target = np.empty((states, 4), dtype=np.int64)
    for state in range(states):
        for action, (down, right) in enumerate(MOVES):
            row, column = state // columns + down, state % columns + right
            free = 0 <= row < rows and 0 <= column < columns and (row, column) not in walls
            target[state, action] = row * columns + column if free else state
    terminal = np.zeros(states, dtype=bool)
    arrival = np.zeros(states)
    for cell, value in ((goal, 1.0), (trap, -1.0)):
        if cell:
            terminal[cell[0] * columns + cell[1]] = True
            arrival[cell[0] * columns + cell[1]] = value
    transition = np.zeros((states, 4, states))
    for action in range(4):
        for turn, probability in ((0, 1 - slip), (1, slip / 2), (3, slip / 2)):
            transition[np.arange(states), action, target[:, (action + turn) % 4]] += probability
    transition[terminal] = np.eye(states)[terminal][:, None]
    reward = transition @ arrival + step_reward
    reward[terminal] = 0.0
    return {
        "transition": transition, "reward": reward, "arrival": arrival, "step_reward": step_reward,
        "terminal": terminal, "start": start[0] * columns + start[1], "discount": discount,
        "shape": (rows, columns), "walls": tuple(walls),
    }  # fmt: skip


def soft_value_iteration(
    mdp: dict, beta: float, tolerance: float = 1e-10, max_iterations: int = 10_000
) -> tuple[np.ndarray, np.ndarray]:
    """The policy that maximises discounted reward plus `beta` times its own entropy (in nats), and its values.

    Iterates `Q(s, a) = r(s, a) + discount * sum_s' P(s' | s, a) V(s')` and `V(s) = beta log sum_a exp(Q(s, a) / beta)`,
    a contraction; terminal states have value 0. The policy is `exp((Q - V) / beta)`.

    Args:
        mdp: as `noisy_gridworld` returns it.
        beta: temperature, > 0, in units of reward.

    Returns:
        The policy (S, A) and the values (S,).

    Raises:
        ValueError: beta is not positive and finite.
        RuntimeError: no convergence within `max_iterations`.
    """
    if not 0 < beta < np.inf:
        raise ValueError(f"beta must be positive and finite, got {beta}")
    reward, going = mdp["reward"], ~mdp["terminal"]
    value = np.zeros(len(reward))
    for _ in range(max_iterations):
        quality = reward + mdp["discount"] * mdp["transition"] @ value
        high = quality.max(1)
        updated = going * (high + beta * np.log(np.exp((quality - high[:, None]) / beta).sum(1)))
        change, value = np.abs(updated - value).max(), updated
        if change <= tolerance:
            weights = np.exp((quality - high[:, None]) / beta)
            return weights / weights.sum(1, keepdims=True), value
    raise RuntimeError(f"soft value iteration moved by {change:.2g} after {max_iterations} iterations")


def uniform_quantiser(p, rate: float) -> np.ndarray:
    """The baseline encoder: as many cells of consecutive symbols, equal in number, as H(T) <= rate allows.

    Returns:
        The cell of each symbol, shape (n,).
    """
    p = np.asarray(p, dtype=np.float64)
    symbols = np.arange(len(p))
    for cells in range(len(p), 0, -1):
        assign = symbols * cells // len(p)
        if entropy_bits(cell_masses(p, assign)) <= rate + 1e-12:
            return assign
    raise ValueError(f"rate must be >= 0, got {rate}")


def coupled_policy(belief: np.ndarray, action_law: np.ndarray, coupling: Callable) -> np.ndarray:
    """`p(a | t)` from the coupling of the belief over codes with the policy: (N, k), (N, A) to (N, k, A).

    A code that the coupling gives no mass acts by the policy itself.
    """
    joint = coupling(belief, action_law)
    mass = joint.sum(-1, keepdims=True)
    return np.where(mass > 0, joint / np.where(mass > 0, mass, 1.0), action_law[:, None, :])


def _update(belief: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """Bayes: belief (N, k) times p(a | t) of the action seen (N, k), normalised by pi(a | s)."""
    posterior = belief * chosen
    total = posterior.sum(
        1, keepdims=True
    )  # pi(a | s) up to rounding; 0 only when the receiver is out of step
    return np.where(total > 0, posterior / np.where(total > 0, total, 1.0), belief)


def receiver_belief(
    policy, p_code, states, actions, coupling: Callable = minimum_entropy_coupling
) -> np.ndarray:
    """What a receiver who knows policy and code law infers from trajectories: its belief over codes.

    Args:
        policy: (S, A).
        p_code: law of the code, (k,).
        states: visited states, integers (episodes, steps).
        actions: actions taken there, (episodes, steps); -1 once the episode is over.
        coupling: must be the agent's, ties included; otherwise the beliefs diverge.

    Returns:
        (episodes, k).
    """
    policy, states, actions = np.asarray(policy), np.asarray(states), np.asarray(actions)
    belief = np.tile(np.asarray(p_code, dtype=np.float64), (len(states), 1))
    for step in range(states.shape[1]):
        rows = np.flatnonzero(actions[:, step] >= 0)
        act = coupled_policy(belief[rows], policy[states[rows, step]], coupling)
        belief[rows] = _update(belief[rows], act[np.arange(len(rows)), :, actions[rows, step]])
    return belief


def markov_coding_game(
    mdp: dict,
    p_message,
    rate: float,
    beta,
    encoder="ebim",
    episodes: int = 60,
    generator: np.random.Generator | None = None,
    max_steps: int = 40,
    agent: str = "coupled",
) -> dict:
    """Play the rate-limited Markov coding game and measure what the receiver understands.

    A message M goes through a deterministic encoder to a code T with H(T) <= rate. At every step the agent couples
    the common belief over T with the policy of its state, and acts by the coupling's conditional law given the true
    code; averaged over codes it follows the policy exactly. The receiver sees states and actions, makes the same
    couplings, updates the belief, and finally guesses the likeliest message.

    Args:
        mdp: as `noisy_gridworld` returns it.
        p_message: law of the message, (n,).
        rate: bound on H(T) in bits.
        beta: temperature of `soft_value_iteration`, or several, played side by side on the same messages.
        encoder: `"ebim"` (`lib.information.ebim` with method `"search"`), `"uniform"` (`uniform_quantiser`), or the
            cell of each message, (n,).
        episodes: episodes for each beta.
        generator: numpy generator; calls with equal generators use the same messages and random numbers, whatever
            the encoder. By default a fresh one with seed 0.
        max_steps: an episode ends here if it has not reached a terminal state.
        agent: `"coupled"`, or `"marginal"`: the mistake of acting by the policy alone while the receiver decodes as
            if it were coupled.

    Returns:
        Arrays over beta (without that axis for a scalar beta): `reward` and `accuracy`, means over episodes;
        `confidence`, mean posterior probability of the receiver's guess, which is an exact forecast of `accuracy`;
        `belief` (…, max_steps + 1), mean belief in the true message after each step; `policy` (…, S, A);
        `states` and `actions` (…, episodes, max_steps), actions -1 once over; `messages` (episodes,); `assign` (n,);
        `p_code` (k,); `H` = H(T) in bits.

    Raises:
        ValueError: an unknown encoder or agent, an encoder that breaks the rate, or no episodes.
    """
    if agent not in ("coupled", "marginal"):
        raise ValueError(f"agent must be 'coupled' or 'marginal', got {agent!r}")
    if episodes < 1 or max_steps < 1:
        raise ValueError(f"episodes and max_steps must be at least 1, got {episodes} and {max_steps}")
    p_message = np.asarray(p_message, dtype=np.float64)
    found = ebim(p_message, rate, method="search")["assign"]  # checks the law and the rate
    if isinstance(encoder, str):
        if encoder not in ("ebim", "uniform"):
            raise ValueError(f"encoder must be 'ebim', 'uniform' or an array, got {encoder!r}")
        assign = found if encoder == "ebim" else uniform_quantiser(p_message, rate)
    else:
        assign = np.asarray(encoder)
        if assign.shape != p_message.shape or assign.min() < 0:
            raise ValueError(f"an encoder array must give each of {len(p_message)} messages a cell >= 0")
        assign = np.unique(assign, return_inverse=True)[1]
    p_code = cell_masses(p_message, assign)[: assign.max() + 1]
    if entropy_bits(p_code) > rate + 1e-9:
        raise ValueError(
            f"the encoder needs {entropy_bits(p_code):.4f} bits, more than the rate of {rate:.4f}"
        )

    generator = generator or np.random.default_rng(0)
    betas = np.atleast_1d(np.asarray(beta, dtype=np.float64))
    draws = generator.random(episodes), generator.random((2, max_steps, len(betas), episodes))
    messages = _draw(np.broadcast_to(p_message, (episodes, len(p_message))), draws[0])
    policies = np.stack([soft_value_iteration(mdp, value)[0] for value in betas])  # (B, S, A)

    count = len(betas) * episodes  # one row per beta and episode
    which = np.repeat(np.arange(len(betas)), episodes)
    code = np.tile(assign[messages], len(betas))
    share = np.tile((p_message / p_code[assign])[messages], len(betas))  # p(message | its code)
    belief = np.tile(p_code, (count, 1))
    state = np.full(count, mdp["start"])
    returns, going = np.zeros(count), np.ones(count, dtype=bool)
    states = np.zeros((count, max_steps), dtype=np.int64)
    actions = np.full((count, max_steps), -1)
    trace = [belief[np.arange(count), code] * share]
    for step in range(max_steps):
        rows = np.flatnonzero(going)
        if len(rows):
            law = policies[which[rows], state[rows]]
            act = coupled_policy(belief[rows], law, minimum_entropy_coupling)
            pick = np.arange(len(rows))
            choice = act[pick, code[rows]] if agent == "coupled" else law
            action = _draw(choice, draws[1][0, step].reshape(-1)[rows])
            states[rows, step], actions[rows, step] = state[rows], action
            belief[rows] = _update(belief[rows], act[pick, :, action])
            state[rows] = _draw(mdp["transition"][state[rows], action], draws[1][1, step].reshape(-1)[rows])
            returns[rows] += mdp["discount"] ** step * (mdp["step_reward"] + mdp["arrival"][state[rows]])
            going[rows] = ~mdp["terminal"][state[rows]]
        trace.append(belief[np.arange(count), code] * share)
    posterior = belief[:, assign] * (p_message / p_code[assign])  # over messages
    guess = posterior.argmax(1)
    shape = (len(betas), episodes)
    result = {
        "reward": returns.reshape(shape).mean(1),
        "accuracy": (guess == np.tile(messages, len(betas))).reshape(shape).mean(1),
        "confidence": posterior.max(1).reshape(shape).mean(1),
        "belief": np.stack(trace, 1).reshape(*shape, -1).mean(1),
        "policy": policies,
        "states": states.reshape(*shape, -1),
        "actions": actions.reshape(*shape, -1),
    }
    if np.ndim(beta) == 0:
        result = {key: value[0] for key, value in result.items()}
    return result | {
        "messages": messages,
        "assign": assign,
        "p_code": p_code,
        "H": float(entropy_bits(p_code)),
    }


def _draw(laws: np.ndarray, uniforms: np.ndarray) -> np.ndarray:
    """One index from each row of `laws` by inverting its cumulative sums; never one of probability 0."""
    sums = laws.cumsum(1)
    return (sums <= (uniforms * sums[:, -1])[:, None]).sum(1)
