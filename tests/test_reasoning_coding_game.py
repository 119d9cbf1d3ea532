import numpy as np
import pytest

from lib.book import load_reference
from lib.information import ebim, entropy_bits, minimum_entropy_coupling
from lib.reasoning import (
    markov_coding_game,
    noisy_gridworld,
    receiver_belief,
    soft_value_iteration,
    uniform_quantiser,
)
from lib.reasoning.coding_game import coupled_policy

SLUG = "minimum-entropy-coupling"
WORLD = noisy_gridworld()
UNIFORM = np.full(16, 1 / 16)


def play(**changes):
    arguments = {
        "mdp": WORLD, "p_message": UNIFORM, "rate": 2.5, "beta": 0.02, "episodes": 40,
        "generator": np.random.default_rng(0),
    }  # fmt: skip
    return markov_coding_game(**arguments | changes)


# --- the grid world


def test_transitions_are_laws_that_respect_walls_and_ends():
    transition = WORLD["transition"]
    assert transition.shape == (30, 4, 30) and np.allclose(transition.sum(2), 1)
    walls = [row * 6 + column for row, column in WORLD["walls"]]
    free = np.setdiff1d(np.arange(30), walls)
    assert (transition[free][:, :, walls] == 0).all()
    for state in np.flatnonzero(WORLD["terminal"]):
        assert (transition[state, :, state] == 1).all() and (WORLD["reward"][state] == 0).all()


def test_slips_and_rewards_by_hand():
    # from (0, 4): east is the goal; north bumps into the edge, south leads to (1, 4)
    world = noisy_gridworld(slip=0.2, step_reward=-0.01)
    assert np.allclose(world["transition"][4, 1, [5, 4, 10]], [0.8, 0.1, 0.1])
    assert np.isclose(world["reward"][4, 1], 0.8 - 0.01)
    assert np.isclose(world["reward"][10, 1], -0.8 - 0.01)  # the trap


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"slip": 1.5}, "slip must be"),
        ({"discount": 1.0}, "discount must be"),
        ({"goal": (5, 0)}, "outside"),
        ({"walls": ((4, 0),)}, "different cells"),
    ],
)
def test_bad_worlds(changes, message):
    with pytest.raises(ValueError, match=message):
        noisy_gridworld(**changes)


# --- the policy


def soft_value_of(policy, beta):
    """Exact value of a policy with entropy bonus, by solving the linear Bellman equation."""
    plogp = policy * np.log(np.where(policy > 0, policy, 1))
    gain = (policy * WORLD["reward"] - beta * plogp).sum(1) * ~WORLD["terminal"]
    moves = np.einsum("sa,sat->st", policy, WORLD["transition"]) * ~WORLD["terminal"][:, None]
    return np.linalg.solve(np.eye(30) - WORLD["discount"] * moves, gain)


@pytest.mark.parametrize("beta", [0.003, 0.05, 1.0])
def test_soft_value_iteration_is_optimal(beta):
    policy, value = soft_value_iteration(WORLD, beta)
    assert np.allclose(policy.sum(1), 1)
    assert np.allclose(soft_value_of(policy, beta), value, atol=1e-8)
    rng = np.random.default_rng(0)
    for _ in range(20):
        other = 0.8 * policy + 0.2 * rng.dirichlet(np.ones(4), 30)
        assert (soft_value_of(other, beta) <= value + 1e-9).all()


def test_cold_policies_reach_the_hard_optimum():
    hard = np.zeros(30)
    for _ in range(500):
        hard = (WORLD["reward"] + WORLD["discount"] * WORLD["transition"] @ hard).max(1) * ~WORLD["terminal"]
    assert np.allclose(soft_value_iteration(WORLD, 1e-4)[1], hard, atol=5e-3)


def test_bad_temperatures():
    for beta in (0.0, -1.0, np.inf, np.nan):
        with pytest.raises(ValueError, match="beta must be"):
            soft_value_iteration(WORLD, beta)
    with pytest.raises(RuntimeError, match="soft value iteration moved"):
        soft_value_iteration(WORLD, 0.1, max_iterations=2)


# --- encoders and steps


def test_uniform_quantiser_uses_as_many_cells_as_the_rate_allows():
    assert np.bincount(uniform_quantiser(UNIFORM, 2.0)).tolist() == [4, 4, 4, 4]
    assert len(np.unique(uniform_quantiser(UNIFORM, 2.2))) == 4
    assert len(np.unique(uniform_quantiser(UNIFORM, 4.0))) == 16
    skewed = 0.5 ** np.arange(1, 9)
    skewed /= skewed.sum()
    cells = uniform_quantiser(skewed, 1.0)
    assert (
        entropy_bits(np.bincount(cells, skewed))
        <= 1
        < entropy_bits(np.bincount(uniform_quantiser(skewed, 1.9), skewed))
    )
    with pytest.raises(ValueError, match="rate must be"):
        uniform_quantiser(UNIFORM, -1)


def test_a_step_is_the_reference():
    coded_step = load_reference(SLUG, "coded_step")
    rng = np.random.default_rng(1)
    belief, policy = rng.dirichlet(np.ones(6), 50), rng.dirichlet(np.ones(4), 50)
    act = coupled_policy(belief, policy, minimum_entropy_coupling)
    assert np.allclose(np.einsum("nt,nta->na", belief, act), policy, atol=1e-12)  # marginally the policy
    states, actions = np.arange(50)[:, None], np.empty((50, 1), dtype=int)
    expected = []
    for i in range(50):
        code = rng.integers(6)
        action, posterior = coded_step(belief[i], policy[i], code, rng.random())
        assert act[i, code, action] > 0
        actions[i] = action
        expected.append(posterior)
    for i in range(50):
        found = receiver_belief(policy, belief[i], states[i : i + 1], actions[i : i + 1])
        assert np.allclose(found[0], expected[i], atol=1e-12)


# --- the game


def test_result_shapes_and_bookkeeping():
    result = play(beta=[0.01, 0.03], max_steps=25)
    assert result["reward"].shape == result["accuracy"].shape == result["confidence"].shape == (2,)
    assert result["belief"].shape == (2, 26) and result["policy"].shape == (2, 30, 4)
    assert result["states"].shape == result["actions"].shape == (2, 40, 25)
    assert np.allclose(result["belief"][:, 0], 1 / 16)  # before the first step: the prior
    assert np.isclose(result["p_code"].sum(), 1) and result["H"] <= 2.5 + 1e-9
    over = result["actions"] < 0
    assert (over[..., 1:] >= over[..., :-1]).all()  # over means over
    assert (result["actions"] < 4).all()
    alone = play(beta=0.01, max_steps=25)
    assert alone["reward"].shape == () and alone["actions"].shape == (40, 25)


def test_moves_follow_the_world():
    result = play(beta=0.05)
    for states, actions in zip(result["states"], result["actions"], strict=True):
        steps = int((actions >= 0).sum())
        assert states[0] == WORLD["start"] and not WORLD["terminal"][states[:steps]].any()
        for t in range(steps - 1):
            assert WORLD["transition"][states[t], actions[t], states[t + 1]] > 0


def test_equal_generators_give_equal_games():
    one, two, other = play(), play(), play(generator=np.random.default_rng(1))
    assert np.array_equal(one["actions"], two["actions"])
    assert not np.array_equal(one["messages"], other["messages"])
    assert np.array_equal(play(generator=None)["actions"], one["actions"])


def test_the_receiver_needs_the_trajectory_only():
    result = play(rate=3.0, beta=0.02)
    belief = receiver_belief(result["policy"], result["p_code"], result["states"], result["actions"])
    guess = (belief[:, result["assign"]] / result["p_code"][result["assign"]]).argmax(1)
    assert (guess == result["messages"]).mean() == result["accuracy"]
    code = result["assign"][result["messages"]]
    assert (belief[np.arange(40), code] > 0).all()  # the truth is never ruled out


def test_a_warm_policy_tells_everything_and_the_mistaken_agent_nothing():
    warm = play(rate=4.0, beta=0.1)
    assert warm["accuracy"] == 1 and warm["belief"][-1] > 0.99
    mistaken = play(rate=4.0, beta=0.1, agent="marginal", episodes=200)
    assert mistaken["accuracy"] < 0.2


def test_actions_follow_the_policy_at_the_start():
    result = play(beta=0.02, episodes=2000)
    first = np.bincount(result["actions"][:, 0], minlength=4) / 2000
    expected = result["policy"][WORLD["start"]]
    assert np.abs(first - expected).max() < 4 * 0.5 / np.sqrt(2000)


def test_encoders_by_name_and_by_array():
    assert np.array_equal(play()["assign"], ebim(UNIFORM, 2.5, "search")["assign"])
    assert np.array_equal(play(encoder="uniform")["assign"], uniform_quantiser(UNIFORM, 2.5))
    labels = np.array([7, 3] * 8)
    own = play(encoder=labels)
    assert own["H"] == 1 and np.array_equal(own["assign"] == 1, labels == 7)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"encoder": "huffman"}, "encoder must be"),
        ({"encoder": np.arange(16)}, "more than the rate"),
        ({"encoder": np.zeros(3, dtype=int)}, "cell >= 0"),
        ({"agent": "silent"}, "agent must be"),
        ({"episodes": 0}, "at least 1"),
        ({"max_steps": 0}, "at least 1"),
        ({"rate": -1.0}, "rate must be"),
        ({"p_message": [0.5, 0.6]}, "p must sum to 1"),
        ({"beta": [0.1, -0.1]}, "beta must be"),
    ],
)
def test_bad_games(changes, message):
    with pytest.raises(ValueError, match=message):
        play(**changes)
