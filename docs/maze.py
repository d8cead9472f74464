"""A maze whose data hold only parts of the way, for figures.py."""

import gymnasium as gym
import numpy as np
import torch


class Maze(gym.Env):
    r"""Cells joined by corridors. The prize of 1 lies at G; P holds a consolation of 0.3, D is a dead end.

    P   E          The data goes S-M-D often, S-P at times, and E-M-G seldom:
    |   |          no trajectory from S ever sees more than 0.3.
    S - M - G
        |
        D
    """

    CELLS = {"S": (-1, 0), "M": (0, 0), "G": (1, 0), "P": (-1, 1), "E": (0, 1), "D": (0, -1)}
    CORRIDORS = {("S", "M"), ("M", "G"), ("S", "P"), ("E", "M"), ("M", "D")}
    ENDS = {"G": 1.0, "P": 0.3, "D": 0.0}
    observation_space = gym.spaces.Box(-1, 1, (2,))
    action_space = gym.spaces.Box(-1, 1, (2,))

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.cell = "S"
        return np.array(self.CELLS[self.cell], np.float32), {}

    def step(self, action):
        axis = np.argmax(np.abs(action))
        target = np.array(self.CELLS[self.cell])
        target[axis] += np.sign(action[axis])
        for a, b in self.CORRIDORS:
            if self.cell in (a, b) and tuple(target) == self.CELLS[b if self.cell == a else a]:
                self.cell = b if self.cell == a else a
                break
        ended = self.cell in self.ENDS
        return np.array(self.CELLS[self.cell], np.float32), self.ENDS.get(self.cell, 0.0), ended, False, {}


def maze_transitions():
    """80 trajectories S-M-D, 40 S-P and 20 E-M-G, their actions with a little noise."""
    rng, rows = np.random.default_rng(0), []
    for path, count in (("SMD", 80), ("SP", 40), ("EMG", 20)):
        for cell, next_cell in zip(path, path[1:], strict=False):
            for _ in range(count):
                here, there = np.array(Maze.CELLS[cell]), np.array(Maze.CELLS[next_cell])
                action = np.clip(there - here + rng.normal(0, 0.1, 2), -1, 1)
                rows.append((here, action, Maze.ENDS.get(next_cell, 0.0), there, next_cell in Maze.ENDS))
    names = ("observations", "actions", "rewards", "next_observations", "terminations")
    columns = zip(*rows, strict=True)
    return {name: torch.tensor(np.array(x), dtype=torch.float32) for name, x in zip(names, columns, strict=True)}
