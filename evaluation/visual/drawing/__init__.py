"""Figures of kept tokens: one layout, written as PNG, as SVG and as a page of HTML."""
