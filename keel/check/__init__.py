"""The preflight: what would go wrong is found before compute is spent on it."""

from keel.check.finding import Finding as Finding
from keel.check.recipe import check_recipe as check_recipe
from keel.check.recipe import preflight as preflight
