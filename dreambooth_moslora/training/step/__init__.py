"""One optimizer step: noise, loss, gradients, optimizer, averages, and the adapters that it trains."""
