"""Where a model meets a mesh: groups, gradient reduction, norms, process start-up."""
