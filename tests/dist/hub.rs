//! A run whose data lies on a hub: a small one on loopback.

use crate::case::{Case, Ended, WASM};
use crate::support_hub::{Access, Hub, TOKEN, add_xsum, files_of};

const FROM_HUB: &[&str] = &[
    "dataset.source=EdinburghNLP/xsum",
    "dataset.split=train[90:122]",
    "dataset.trust_remote_code=True",
    "dataset_val.split=validation[:4]",
    "max_steps_per_epoch=2",
];

fn run(case: &Case, endpoint: &str, output_dir: &str) -> Ended {
    let output_dir = format!("output_dir={output_dir}");
    let mut command = case.run(WASM, &[FROM_HUB, &[&output_dir]].concat());
    command.env("HF_ENDPOINT", endpoint).env("HF_HOME", case.path("hf")).env_remove("HF_TOKEN");
    Ended::of(&mut command)
}

/// The main job as its users typed it: the data set by its name on the hub, whose program is not run. What was fetched
/// serves when the hub has gone.
#[test]
fn trains_on_a_data_set_of_the_hub_and_again_without_it() {
    let (case, hub) = (Case::new(), Hub::start());
    add_xsum(&hub);
    let endpoint = hub.address.clone();
    let first = run(&case, &endpoint, "first");
    assert_eq!(first.code, 0, "{}", first.stderr);
    let losses = case.log("first");
    assert_eq!(losses.len(), 2);
    assert_eq!(first.stderr.matches("no code of a data set is ever run").count(), 1, "{}", first.stderr);

    let fetched: Vec<_> = hub.fetched().into_iter().filter(|asked| !asked.is_storage).collect();
    assert_eq!(fetched.len(), 3, "two shards of train, one of validation: {fetched:?}");
    let record: serde_json::Value =
        serde_json::from_slice(&std::fs::read(case.path("first/epoch_0/run.json")).unwrap()).unwrap();
    let commit = hub.commit("datasets/EdinburghNLP/xsum", "refs/convert/parquet");
    assert_eq!(record["hub_data"][0]["pinned"]["commit"], commit.as_str());

    let second = run(&case, &endpoint, "second");
    assert_eq!((second.code, case.log("second")), (0, losses.clone()), "{}", second.stderr);
    assert_eq!(hub.fetched().len(), 0, "everything is cached");

    // The record of a run is a config that repeats it: the commit is in it, and nothing is asked.
    hub.asked();
    case.write("recorded.yaml", std::fs::read(case.path("first/epoch_0/config_resolved.yaml")).unwrap());
    let mut repeat = case.host(&["run", WASM, "--config", "recorded.yaml", "output_dir=repeated"]);
    repeat.args(["checkpointer.output_dir=repeated", "metric_logger.log_dir=repeated/logs"]);
    let repeated = Ended::of(repeat.env("HF_ENDPOINT", &endpoint).env("HF_HOME", case.path("hf")));
    assert_eq!((repeated.code, case.log("repeated")), (0, losses.clone()), "{}", repeated.stderr);
    assert_eq!(hub.asked().len(), 0);

    drop(hub);
    let third = run(&case, &endpoint, "third");
    assert_eq!((third.code, case.log("third")), (0, losses), "{}", third.stderr);
    assert!(third.stderr.contains("is taken as it was cached"), "{}", third.stderr);
}

/// `download` of a gated model in shards, and a run on what it wrote.
#[test]
fn trains_on_a_downloaded_model() {
    let (case, hub) = (Case::new(), Hub::start());
    add_xsum(&hub);
    let files = files_of(&case.path("model"));
    hub.add(
        "models/tiny/llama",
        Access::Gated,
        "main",
        files.iter().map(|(path, bytes)| (path.as_str(), bytes.clone())),
    );
    std::fs::remove_dir_all(case.path("model")).unwrap();
    let mut download = case.host(&["download", "tiny/llama", "--output-dir", "model", "--hf-token", TOKEN]);
    let downloaded = Ended::of(download.env("HF_ENDPOINT", &hub.address));
    assert_eq!(downloaded.code, 0, "{}", downloaded.stderr);
    let ended = run(&case, &hub.address, "out");
    assert_eq!((ended.code, case.log("out").len()), (0, 2), "{}", ended.stderr);
    let adapter = std::fs::read_to_string(case.path("out/epoch_0/adapter/adapter_config.json")).unwrap();
    assert!(adapter.contains("\"base_model_name_or_path\": \"tiny/llama\""), "{adapter}");
}
