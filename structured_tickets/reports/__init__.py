"""From runs to an answer: what they wrote, compared over seeds, drawn, and put on a page."""
