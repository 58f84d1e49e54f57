"""The closed forms that the tests measure against; they stand in `ldm.analysis.oracle`."""

from ldm.analysis.oracle import AnalyticNet, Mixture, flow_error, gaussian, mixture, settled_slope, slope

__all__ = ["AnalyticNet", "Mixture", "flow_error", "gaussian", "mixture", "settled_slope", "slope"]
