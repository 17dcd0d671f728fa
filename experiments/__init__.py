"""The paper's experiments: sweeps as data, a runner, tables."""
