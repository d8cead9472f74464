"""Draws the pictures of README and docs, by importing the scripts: an example of using their pieces.

python docs/figures.py expectile                                                 # docs/expectile.png
python docs/figures.py returns runs/PEN/checkpoint.pt runs/HAMMER/checkpoint.pt  # docs/returns.png
MUJOCO_GL=egl python docs/figures.py animation runs/HAMMER/checkpoint.pt         # docs/hammer.gif
"""

import sys
from functools import partial
from pathlib import Path

import gymnasium as gym
import matplotlib
import numpy as np
import torch
from PIL import Image

matplotlib.use("Agg")
import matplotlib.pyplot as plt

DOCS = Path(__file__).resolve().parent
sys.path.insert(0, str(DOCS.parent))
from maze import Maze, maze_transitions  # noqa: E402

import iql_continuous as iql  # noqa: E402

COLORS = ("#0072B2", "#D55E00", "#009E73")  # Okabe and Ito's, for all eyes
WHAT = {"S": "start S", "M": "crossing M", "G": "goal G", "P": "side P", "E": "entrance E", "D": "dead end D"}


def load_policy(path):
    """The environment's id and the policy of a checkpoint."""
    saved = iql.load(path)
    env = iql.make_env(saved["args"]["env_id"])()
    agent = iql.Agent(env.observation_space.shape[0], env.action_space.shape[0], iql.Args())
    agent.load_state_dict(saved["agent"])
    return saved["args"]["env_id"], agent.actor.act


def random_action(rng, shape, obs):
    """Actions of a random policy, whatever it sees."""
    return rng.uniform(-1, 1, shape)


def draw_returns(paths):
    """The returns of 20 episodes, each from another start: a trained policy next to a random one."""
    figure, axes = plt.subplots(1, len(paths), figsize=(4.2 * len(paths), 3.2), dpi=120, layout="constrained")
    for ax, path in zip(np.atleast_1d(axes), paths, strict=True):
        env_id, policy = load_policy(path)
        envs, rng = gym.vector.SyncVectorEnv([iql.make_env(env_id)]), np.random.default_rng(0)
        random_policy = partial(random_action, rng, envs.action_space.shape)
        both = {"IQL": iql.evaluate(envs, policy, 20), "random": iql.evaluate(envs, random_policy, 20)}
        for (name, (returns, _)), color in zip(both.items(), COLORS, strict=False):
            ax.plot(np.arange(1, 21), returns, "o", color=color, label=name)
            ax.axhline(returns.mean(), color=color, linestyle="--", label=f"its mean, {returns.mean():.0f}")
        ax.set(title=env_id, xlabel="episode", ylabel="return")
        ax.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2)
        ax.grid(alpha=0.3)
    figure.savefig(DOCS / "returns.png")


def train_in_maze(expectile):
    """An agent trained on the maze's fragments of paths."""
    torch.manual_seed(0)
    args = iql.Args(expectile=expectile, beta=30.0, gamma=0.9, learning_rate=1e-3, actor_dropout=0.0)
    transitions, agent = maze_transitions(), iql.Agent(2, 2, args)
    optimizers = iql.make_optimizers(agent, args.learning_rate)
    for _ in range(500):
        indices = torch.randint(len(transitions["rewards"]), (64,))
        iql.update(agent, optimizers, {name: tensor[indices] for name, tensor in transitions.items()}, args)
    return agent


def draw_expectile():
    """Expectiles of a sample, and what V and the policy learn in a maze for two expectiles."""
    figure, axes = plt.subplots(1, 3, figsize=(9.6, 3.2), dpi=120, layout="constrained")
    sample = torch.tensor(np.random.default_rng(0).gamma(2.0, size=2000))
    axes[0].hist(sample, bins=50, color="lightgray")
    for expectile, color in zip((0.5, 0.7, 0.9), COLORS, strict=True):
        candidates = torch.linspace(0, 8, 801, dtype=torch.float64)
        losses = [iql.expectile_loss(sample - m, expectile) for m in candidates]
        m = candidates[int(torch.stack(losses).argmin())].item()
        axes[0].axvline(m, color=color, label=f"{expectile}: {m:.2f}")
    axes[0].set(title="expectiles of a sample", xlabel="value", ylabel="count")
    axes[0].legend(frameon=False, fontsize=9, title="expectile")
    for ax, expectile in zip(axes[1:], (0.5, 0.9), strict=True):
        agent, env = train_in_maze(expectile), Maze()
        for a, b in Maze.CORRIDORS:
            ax.plot(*zip(Maze.CELLS[a], Maze.CELLS[b], strict=True), color="lightgray", linewidth=14, zorder=0)
        with torch.no_grad():
            cells = torch.tensor(list(Maze.CELLS.values()), dtype=torch.float32)
            values = [Maze.ENDS.get(name, v.item()) for name, v in zip(Maze.CELLS, agent.vf(cells), strict=True)]
        points = ax.scatter(*cells.T, c=values, cmap="viridis", vmin=0, vmax=1, s=600, zorder=2)
        for (name, xy), value in zip(Maze.CELLS.items(), values, strict=True):
            worth = f"prize {Maze.ENDS[name]:g}" if name in Maze.ENDS else f"V {value:.2f}"
            offset, va = ((0, 17), "bottom") if xy[1] > 0 else ((0, -17), "top")
            text = f"{WHAT[name]}\n{worth}"
            ax.annotate(text, xy, offset, textcoords="offset points", ha="center", va=va, fontsize=8)
        obs, done, path = env.reset()[0], False, [Maze.CELLS["S"]]
        while not done and len(path) < 8:
            obs, _, done, _, _ = env.step(agent.actor.act(obs[None])[0])
            path.append(tuple(obs))
        for start, end in zip(path, path[1:], strict=False):
            arrow = {"arrowstyle": "-|>", "color": COLORS[1], "linewidth": 2.5}
            ax.annotate("", end, start, arrowprops=arrow, zorder=3)
        ax.set(title=f"expectile {expectile}", xlim=(-1.55, 1.55), ylim=(-1.9, 1.8))
        ax.set_xticks([])
        ax.set_yticks([])
    figure.colorbar(points, ax=axes[2], label="V")
    figure.savefig(DOCS / "expectile.png")


def draw_animation(path):
    """The first 100 steps of an episode of a policy, every third frame."""
    env_id, policy = load_policy(path)
    env, frames, done = iql.make_env(env_id, render_mode="rgb_array")(), [], False
    obs, _ = env.reset(seed=iql.EVAL_SEED)
    while not done:
        obs, _, terminated, truncated, _ = env.step(policy(obs[None])[0])
        frames.append(Image.fromarray(env.render()).crop((60, 60, 420, 420)).resize((240, 240)))
        done = terminated or truncated
    frames = [frame.quantize(64) for frame in frames[:100:3]]
    frames[0].save(DOCS / "hammer.gif", save_all=True, append_images=frames[1:], duration=90, loop=0)


if __name__ == "__main__":
    what, *paths = sys.argv[1:] or ["expectile"]
    if what == "expectile":
        draw_expectile()
    elif what == "returns" and paths:
        draw_returns(paths)
    elif what == "animation" and len(paths) == 1:
        draw_animation(paths[0])
    else:
        sys.exit(__doc__)
