"""How the page is served to several people: who asks, what a request may cost, and what an upload becomes."""
