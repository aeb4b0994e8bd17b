"""The cloud's half of the app."""

from flwr.app import ArrayRecord, ConfigRecord, Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from digits import task

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run federated averaging from a fresh model."""
    config = context.run_config
    strategy = FedAvg(fraction_evaluate=1.0)
    result = strategy.start(
        grid=grid,
        initial_arrays=ArrayRecord(task.Net().state_dict()),
        num_rounds=config["num-server-rounds"],
        train_config=ConfigRecord({"lr": config["learning-rate"]}),
    )
    for number, metrics in result.evaluate_metrics_clientapp.items():
        print(f"round {number}: {dict(metrics)}")
    task.save(result.arrays.to_torch_state_dict(), "final_model.pt")
