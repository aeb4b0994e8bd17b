"""The cloud's half of the app."""

from flwr.app import ArrayRecord, ConfigRecord, Context
from flwr.serverapp import Grid, ServerApp
from flep_fl import EncryptedFedAvg

from digits import task

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run federated averaging from a fresh model."""
    config = context.run_config
    strategy = EncryptedFedAvg("kits/cloud", fraction_evaluate=1.0)
    result = strategy.start(
        grid=grid,
        initial_arrays=ArrayRecord(task.Net().state_dict()),
        num_rounds=config["num-server-rounds"],
        train_config=ConfigRecord({"lr": config["learning-rate"]}),
    )
    for number, metrics in result.evaluate_metrics_clientapp.items():
        print(f"round {number}: {dict(metrics)}")
    print("the model is at the sites: kits/*/model/model.pt")
