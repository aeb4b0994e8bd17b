"""Self-contained HTML pages: blocks, inline SVG charts, and the template that puts them together."""
