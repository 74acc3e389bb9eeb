"""Router families: pure functions (RouterInputs, options) -> Routing."""
