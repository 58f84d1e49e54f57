"""Tools to study models and samplers: traces, plans, likelihoods, exact denoisers, resumed runs."""
