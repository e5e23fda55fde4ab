//! `download`, and data sets on the hub, against a small hub on loopback.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use insta::assert_snapshot;
use serde_json::{Value, json};

use super::CONFIG;
use super::support_hub::{Access, Hub, STRANGER, TOKEN, add_xsum, files_of, xsum};

const MODEL: &str = "tiny/llama";
const SHARD: &str = "model-00001-of-00002.safetensors";

/// A hub, and a user with an empty home.
struct Case {
    hub: Option<Hub>,
    endpoint: String,
    dir: tempfile::TempDir,
    environment: BTreeMap<&'static str, String>,
}

fn model_files() -> Vec<(String, Vec<u8>)> {
    let mut files = files_of(&Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/tiny-llama"));
    files.push(("original/params of Meta.json".to_owned(), b"{}".to_vec()));
    files.push(("original/consolidated.00.pth".to_owned(), vec![3; 5000]));
    files.push(("empty".to_owned(), vec![]));
    files
}

impl Case {
    fn new() -> Self {
        let hub = Hub::start();
        let files = model_files();
        for (repo, access) in
            [(MODEL, Access::Public), ("tiny/gated", Access::Gated), ("tiny/private", Access::Private)]
        {
            let files = files.iter().map(|(path, content)| (path.as_str(), content.clone()));
            hub.add(&format!("models/{repo}"), access, "main", files);
        }
        let dir = tempfile::tempdir().unwrap();
        Self { endpoint: hub.address.clone(), hub: Some(hub), dir, environment: BTreeMap::new() }
    }

    fn hub(&self) -> &Hub {
        self.hub.as_ref().unwrap()
    }

    fn set(mut self, name: &'static str, value: &str) -> Self {
        self.environment.insert(name, value.to_owned());
        self
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn write(&self, name: &str, content: impl AsRef<[u8]>) {
        std::fs::create_dir_all(self.path(name).parent().unwrap()).unwrap();
        std::fs::write(self.path(name), content).unwrap();
    }

    /// Exit code and what is printed, with names instead of addresses; whatever happens, no token is among it.
    fn host(&self, arguments: &[&str]) -> String {
        let output = Command::new(env!("CARGO_BIN_EXE_host"))
            .args(arguments)
            .current_dir(self.dir.path())
            .env_clear()
            .env("HOME", self.dir.path())
            .env("HF_ENDPOINT", &self.endpoint)
            .envs(&self.environment)
            .output()
            .unwrap();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim_end().to_owned();
        let (stdout, stderr) = (text(&output.stdout), text(&output.stderr));
        for secret in [TOKEN, STRANGER, "hf_wrong"] {
            assert!(!stdout.contains(secret) && !stderr.contains(secret), "a token is shown:\n{stdout}\n{stderr}");
        }
        let mut out = format!("exit {}", output.status.code().unwrap());
        for (name, text) in [("stdout", stdout), ("stderr", stderr)] {
            if !text.is_empty() {
                out += &format!("\n--- {name}\n{text}");
            }
        }
        let real = self.dir.path().canonicalize().unwrap();
        out.replace(&self.endpoint, "HUB").replace(real.to_str().unwrap(), "DIR")
    }

    fn download(&self, arguments: &[&str]) -> String {
        self.host(&[&["download", "--output-dir", "out"], arguments].concat())
    }

    /// What `out` holds, by path.
    fn downloaded(&self) -> BTreeMap<String, Vec<u8>> {
        let mut files = BTreeMap::new();
        let mut folders = vec![self.path("out")];
        while let Some(folder) = folders.pop() {
            for entry in std::fs::read_dir(folder).into_iter().flatten() {
                let path = entry.unwrap().path();
                if path.is_dir() {
                    folders.push(path);
                } else {
                    let name = path.strip_prefix(self.path("out")).unwrap().to_str().unwrap().to_owned();
                    files.insert(name, std::fs::read(&path).unwrap());
                }
            }
        }
        files
    }

    #[track_caller]
    fn check_whole(&self) {
        let mut expected: BTreeMap<_, _> = model_files().into_iter().collect();
        expected.insert("original_repo_id.json".into(), format!("{:#}\n", json!({"repo_id": MODEL})).into_bytes());
        let downloaded = self.downloaded();
        assert_eq!(downloaded.keys().collect::<Vec<_>>(), expected.keys().collect::<Vec<_>>());
        assert!(downloaded == expected, "a file differs");
    }
}

#[test]
fn a_download_is_whole_and_the_next_one_fetches_nothing() {
    let case = Case::new().set("HF_TOKEN", TOKEN);
    assert_snapshot!(case.download(&[MODEL]), @"
    exit 0
    --- stdout
    Successfully downloaded model repo and wrote to the following locations:
    DIR/out/README.md
    DIR/out/config.json
    DIR/out/empty
    DIR/out/generation_config.json
    DIR/out/model-00001-of-00002.safetensors
    DIR/out/model-00002-of-00002.safetensors
    DIR/out/model.safetensors.index.json
    DIR/out/original/consolidated.00.pth
    DIR/out/original/params of Meta.json
    DIR/out/original_repo_id.json
    DIR/out/special_tokens_map.json
    DIR/out/tokenizer.json
    DIR/out/tokenizer_config.json
    ");
    case.check_whole();
    let asked = case.hub().asked();
    assert!(
        asked.iter().all(|asked| asked.has_token != asked.is_storage),
        "the hub's storage gets no token: {asked:?}"
    );
    assert!(asked.iter().filter(|asked| asked.is_storage).count() >= 3);

    assert!(case.download(&[MODEL]).starts_with("exit 0"));
    assert_eq!(case.hub().fetched().len(), 0);
    // A file that changed here is fetched again, and only that.
    case.write("out/config.json", "{}");
    assert!(case.download(&[MODEL]).starts_with("exit 0"));
    assert_eq!(case.hub().fetched().len(), 1);
    case.check_whole();
}

#[test]
fn patterns_leave_files_out() {
    let case = Case::new();
    let patterns = ["--ignore-patterns", "*.safetensors", "--ignore-patterns", "original/*"];
    assert_snapshot!(case.download(&[&patterns[..], &[MODEL]].concat()), @"
    exit 0
    --- stdout
    Ignoring files matching the following patterns: *.safetensors, original/*
    Successfully downloaded model repo and wrote to the following locations:
    DIR/out/README.md
    DIR/out/config.json
    DIR/out/empty
    DIR/out/generation_config.json
    DIR/out/model.safetensors.index.json
    DIR/out/original_repo_id.json
    DIR/out/special_tokens_map.json
    DIR/out/tokenizer.json
    DIR/out/tokenizer_config.json
    ");
    assert!(case.hub().fetched().iter().all(|asked| !asked.path.ends_with(".safetensors")));
    assert!(!case.path("out/original").exists());
    assert_snapshot!(case.download(&[MODEL, "--ignore-patterns", "*"]), @"
    exit 2
    --- stdout
    Ignoring files matching the following patterns: *
    --- stderr
    error: `tiny/llama` has no file to fetch
    hint: it has 12 files, all of which are ignored
    ");
    assert_snapshot!(case.download(&[MODEL, "--ignore-patterns", "[a"]), @"
    exit 2
    --- stderr
    error: `[a` is not a pattern of file names
    cause: error parsing glob '[a': unclosed character class; missing ']'
    hint: such as `*.bin`
    ");
}

#[test]
fn a_cut_connection_is_taken_up_again() {
    let case = Case::new();
    case.hub().faults(|faults| {
        faults.cut.insert(SHARD.into(), (400_000, 2));
    });
    assert!(case.download(&[MODEL]).starts_with("exit 0"));
    let ranges: Vec<_> =
        case.hub().fetched().into_iter().filter(|asked| asked.is_storage).filter_map(|a| a.range).collect();
    assert_eq!(ranges, ["bytes=400000-", "bytes=800000-"]);
    case.check_whole();
}

#[test]
fn a_broken_download_goes_on_in_the_next_run() {
    let case = Case::new();
    case.hub().faults(|faults| {
        faults.cut.insert(SHARD.into(), (0, 99));
    });
    case.hub().faults(|faults| {
        faults.cut.insert("tokenizer.json".into(), (70_000, 1));
    });
    assert_snapshot!(case.download(&[MODEL, "--ignore-patterns", "*-00002-of-*"]), @"
    exit 1
    --- stdout
    Ignoring files matching the following patterns: *-00002-of-*
    --- stderr
    error: the download of `model-00001-of-00002.safetensors` broke off after 0 of 1838464 bytes
    cause: Peer disconnected
    hint: run the same command again: it goes on where it stopped
    ");
    assert!(!case.path("out").join(SHARD).exists());
    // As if it had been killed in the middle.
    let content = model_files().into_iter().find(|(path, _)| path == SHARD).unwrap().1;
    case.write(&format!("out/{SHARD}.{}.partial", &sha2_hex(&content)[..12]), &content[..1_000_000]);
    case.hub().faults(|faults| faults.cut.clear());
    case.hub().asked();
    assert!(case.download(&[MODEL]).starts_with("exit 0"));
    let asked: Vec<_> = case.hub().fetched().into_iter().filter(|asked| asked.path.ends_with(SHARD)).collect();
    assert!(asked.iter().all(|asked| asked.range.as_deref() == Some("bytes=1000000-")), "{asked:?}");
    case.check_whole();
}

#[test]
fn a_server_without_ranges_starts_over() {
    let case = Case::new();
    case.hub().faults(|faults| {
        faults.ignore_ranges = true;
        faults.cut.insert(SHARD.into(), (300_000, 1));
    });
    assert!(case.download(&[MODEL]).starts_with("exit 0"));
    case.check_whole();
}

#[test]
fn what_arrives_damaged_is_not_kept() {
    let case = Case::new();
    case.hub().faults(|faults| {
        faults.damage.insert("tokenizer.json".into());
    });
    let said = case.download(&[MODEL]);
    let shown: Vec<_> = said.lines().filter(|line| !line.starts_with("cause:")).collect();
    assert_snapshot!(shown.join("\n"), @"
    exit 1
    --- stderr
    error: `tokenizer.json` arrived damaged; it is not kept
    hint: run the command again; if it stays so, the network or the mirror changes files
    ");
    assert!(said.contains("cause: its hash is "), "{said}");
    assert!(case.downloaded().keys().all(|name| !name.contains("tokenizer.json")), "{:?}", case.downloaded().keys());

    // A partial file with the wrong beginning is thrown away, once, and the file fetched whole.
    case.hub().faults(|faults| faults.damage.clear());
    assert!(case.download(&[MODEL]).starts_with("exit 0"));
    let shard = std::fs::read(case.path("out").join(SHARD)).unwrap();
    std::fs::remove_file(case.path("out").join(SHARD)).unwrap();
    let digest: String = sha2_hex(&shard)[..12].to_owned();
    case.write(&format!("out/{SHARD}.{digest}.partial"), vec![9; 100]);
    assert!(case.download(&[MODEL]).starts_with("exit 0"));
    case.check_whole();
}

fn sha2_hex(bytes: &[u8]) -> String {
    use sha2::Digest;
    sha2::Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

#[test]
fn who_may_not_read_is_told_why() {
    let case = Case::new();
    assert_snapshot!(case.download(&["tiny/gated"]), @"
    exit 2
    --- stderr
    error: the model `tiny/gated` is gated, and no token was given
    cause: the hub answered 401 Unauthorized: Access to this model is restricted. You must have access to it and be authenticated.
    hint: ask for access on HUB/tiny/gated
    hint: then make a token on HUB/settings/tokens and give it as `--hf-token`, HF_TOKEN or by `hf auth login`
    ");
    assert_snapshot!(case.download(&["tiny/gated", "--hf-token", STRANGER]), @"
    exit 2
    --- stderr
    error: the model `tiny/gated` is gated, and the token of `--hf-token` has no access
    cause: the hub answered 403 Forbidden: Access to this model is restricted.
    hint: ask for access on HUB/tiny/gated with the account the token is of
    ");
    assert_snapshot!(case.download(&["tiny/gated", "--hf-token", "hf_wrong"]), @"
    exit 2
    --- stderr
    error: the hub does not accept the token of `--hf-token`
    cause: the hub answered 401 Unauthorized: Invalid credentials in Authorization header
    hint: make a new one on HUB/settings/tokens
    ");
    assert_snapshot!(case.download(&["tiny/gated", "--hf-token", "two words"]), @"
    exit 2
    --- stderr
    error: what `--hf-token` holds is no token: it has blanks or foreign letters
    hint: a token of the hub is like `hf_…`, see https://huggingface.co/settings/tokens
    ");
    assert_snapshot!(case.download(&["tiny/absent"]), @"
    exit 2
    --- stderr
    error: the hub has no model `tiny/absent`, or none that may be seen
    cause: the hub answered 401 Unauthorized: Invalid username or password.
    hint: check the name, capital letters too
    hint: if it is private, give a token: `--hf-token`, HF_TOKEN or `hf auth login`
    ");
    assert_snapshot!(case.download(&["tiny/private", "--hf-token", STRANGER]), @"
    exit 2
    --- stderr
    error: the hub has no model `tiny/private`, or none that may be seen
    cause: the hub answered 404 Not Found: Repository not found
    hint: check the name, capital letters too
    hint: if it is private, the token of `--hf-token` has no access
    ");
    assert_snapshot!(case.download(&[MODEL, "--revision", "v7"]), @"
    exit 2
    --- stderr
    error: the model `tiny/llama` has no revision `v7`
    cause: the hub answered 404 Not Found: Invalid rev id: v7
    hint: its branches, tags and commits are on HUB/tiny/llama
    ");
    assert_snapshot!(case.download(&["tiny/gated", "--type", "dataset", "--hf-token", TOKEN]), @"
    exit 2
    --- stderr
    error: the hub has no data set `tiny/gated`, or none that may be seen
    cause: the hub answered 404 Not Found: Repository not found
    hint: check the name, capital letters too
    hint: if it is private, the token of `--hf-token` has no access
    ");
    // An empty file needs no leave to be read.
    assert_eq!(case.downloaded().keys().collect::<Vec<_>>(), ["empty"]);
    assert!(case.download(&["tiny/gated", "--hf-token", TOKEN]).starts_with("exit 0"));
}

#[test]
fn tokens_come_from_three_places() {
    let wrong_file = Case::new().set("HF_HOME", "hf");
    wrong_file.write("hf/token", "hf_wrong\n");
    assert!(wrong_file.download(&["tiny/private"]).contains("does not accept the token of `hf/token`"));
    assert!(wrong_file.download(&["tiny/private", "--hf-token", TOKEN]).starts_with("exit 0"));
    let environment = wrong_file.set("HF_TOKEN", TOKEN).set("HOST_LOG", "trace");
    std::fs::remove_dir_all(environment.path("out")).unwrap();
    assert!(environment.download(&["tiny/private"]).starts_with("exit 0"));
}

#[test]
fn a_hub_that_is_not_there() {
    let mut case = Case::new();
    case.hub().faults(|faults| faults.status = Some("503 Service Unavailable"));
    assert_snapshot!(case.download(&[MODEL]), @"
    exit 1
    --- stderr
    error: the hub at `HUB` is in trouble
    cause: the hub answered 503 Service Unavailable
    hint: try again later
    ");
    case.hub().faults(|faults| {
        faults.status = None;
        faults.not_json = true;
    });
    assert_snapshot!(case.download(&[MODEL]), @"
    exit 1
    --- stderr
    error: cannot use the answer of the hub at `HUB`: its answer is not JSON
    cause: expected value at line 1 column 1
    hint: is `HF_ENDPOINT` a hub?
    ");
    drop(case.hub.take());
    assert_snapshot!(case.download(&[MODEL]), @"
    exit 1
    --- stderr
    error: cannot reach the hub at `HUB`
    cause: io: Connection refused (os error 111)
    hint: check the network; HTTPS_PROXY names a proxy, SSL_CERT_FILE its certificates, HF_ENDPOINT a mirror
    ");
    let case = case.set("HF_HUB_OFFLINE", "1");
    assert_snapshot!(case.download(&[MODEL]), @"
    exit 1
    --- stderr
    error: `tiny/llama` is on the hub, and HF_HUB_OFFLINE forbids to ask it
    hint: unset HF_HUB_OFFLINE, or fetch it on a machine that may
    ");
    let case = case.set("HF_ENDPOINT", "huggingface.co");
    assert_snapshot!(case.download(&[MODEL]), @"
    exit 2
    --- stderr
    error: HF_ENDPOINT is `huggingface.co`, which is no address
    hint: it is like `https://huggingface.co`; unset it for the official hub
    ");
    let case = case.set("HF_ENDPOINT", "https://localhost:1").set("SSL_CERT_FILE", "certificates.pem");
    case.write("certificates.pem", "none");
    assert_snapshot!(case.download(&[MODEL]), @"
    exit 2
    --- stderr
    error: SSL_CERT_FILE names `certificates.pem`, which holds no certificates in PEM
    hint: unset it to trust what the public web trusts
    ");
    assert!(!case.path("out").exists());
}

#[test]
fn arguments_that_cannot_be() {
    let case = Case::new();
    assert_snapshot!(case.download(&[MODEL, "--source", "kaggle", "--kaggle-username", "me"]), @"
    exit 2
    --- stderr
    error: models of Kaggle are not fetched: they come as archives that need its own program
    hint: `kaggle models instances versions download` gets one, as a folder that `checkpoint_dir` takes
    hint: most are on the Hugging Face hub too: `host download ORG/NAME`
    ");
    assert_snapshot!(case.download(&["https://huggingface.co/tiny/llama"]), @"
    exit 2
    --- stderr
    error: `https://huggingface.co/tiny/llama` is not the name of a repository
    hint: names are `org/name`, such as `meta-llama/Meta-Llama-3.1-8B-Instruct`
    ");
    assert_snapshot!(case.download(&[MODEL, "--revision", "../main"]), @"
    exit 2
    --- stderr
    error: `../main` is not a revision
    hint: a revision is a branch, a tag or a commit, such as `main`
    ");
    case.write("out", "a file");
    assert_snapshot!(case.download(&[MODEL]), @"
    exit 2
    --- stderr
    error: `out` is a file, and a folder is written
    hint: give another with `--output-dir`
    ");
    assert_eq!(case.hub().asked().len(), 0);
}

#[test]
fn a_hub_cannot_write_outside_the_folder() {
    let case = Case::new();
    let entry = json!({"type": "file", "path": "../evil", "size": 2, "oid": "0".repeat(40)});
    case.hub().faults(|faults| faults.listed = Some(entry));
    assert_snapshot!(case.download(&[MODEL]), @r#"
    exit 1
    --- stderr
    error: cannot use the answer of the hub at `HUB`: it lists the file {"type":"file","path":"../evil","size":2,"oid":"0000000000000000000000000000000000000000"}
    "#);
}

#[test]
fn a_data_set_as_files() {
    let case = Case::new();
    add_xsum(case.hub());
    let revision = "refs/convert/parquet";
    let said = case.download(&["EdinburghNLP/xsum", "--type", "dataset", "--revision", revision]);
    assert_snapshot!(said, @"
    exit 0
    --- stdout
    Successfully downloaded dataset repo and wrote to the following locations:
    DIR/out/default/test/0000.parquet
    DIR/out/default/train/0000.parquet
    DIR/out/default/train/0001.parquet
    DIR/out/default/validation/0000.parquet
    ");
    assert_eq!(case.downloaded()["default/train/0001.parquet"], xsum(100..160));
}

// Data sets that a config names. `run` fetches and then ends, because there is no model worth the name; what it fetched,
// `validate` shows.

impl Case {
    fn with_config(self) -> Self {
        let model = super::MODEL_CONFIG;
        self.write("c.yaml", CONFIG.replace("source: data", "source: org/rows"));
        self.write("model/config.json", model);
        self.write("model/model.safetensors", super::weights(model));
        self.write("model/tokenizer.json", "{}");
        self.write("templates/summarize.wasm", super::COMPONENT);
        self.write("recipes/lora_distributed.wasm", super::COMPONENT);
        self
    }

    fn run(&self, overrides: &[&str]) -> String {
        self.host(&[&["run", "lora_distributed", "--config", "c.yaml"], overrides].concat())
    }

    /// The files of the plan as `split:path`, and where they are from.
    #[track_caller]
    fn plan(&self, overrides: &[&str]) -> (Vec<String>, Value) {
        self.run(overrides);
        let said = self.host(&[&["validate", "--json", "c.yaml"], overrides].concat());
        let text = said.strip_prefix("exit 0\n--- stdout\n").unwrap_or_else(|| panic!("{said}"));
        let value: Value = serde_json::from_str(text).unwrap();
        let dataset = &value["plan"]["train"]["dataset"][0];
        let name = |file: &Value| {
            let path = file["path"].as_str().unwrap().replace("DIR", self.dir.path().to_str().unwrap());
            assert!(std::fs::metadata(&path).unwrap().len() > 0);
            let parts: Vec<_> = path.split('/').collect();
            let inside = parts.iter().position(|part| *part == "snapshots").unwrap() + 2;
            format!("{}:{}", file["split"].as_str().unwrap(), parts[inside..].join("/"))
        };
        (dataset["files"].as_array().unwrap().iter().map(name).collect(), dataset["hub"]["pinned"].clone())
    }
}

const ROW: &[u8] = b"{\"input\": \"a\", \"output\": \"b\"}\n";

#[test]
fn validate_fetches_nothing() {
    let case = Case::new().with_config();
    add_xsum(case.hub());
    let xsum = ["dataset.source=EdinburghNLP/xsum", "dataset.trust_remote_code=True"];
    assert_snapshot!(case.host(&[&["validate", "c.yaml"], &xsum[..]].concat()), @"
    exit 0
    --- stdout
    Config is well-formed!
    --- stderr
    notice: `dataset.trust_remote_code` changes nothing here: no code of a data set is ever run (command line)
    notice: `EdinburghNLP/xsum` is not in the cache; a run fetches it from the hub (command line)
    ");
    assert_eq!(case.hub().asked().len(), 0);
    let (files, pinned) = case.plan(&xsum);
    assert_eq!(files, ["train:default/train/0000.parquet", "train:default/train/0001.parquet"]);
    assert_eq!(pinned["commit"], case.hub().commit("datasets/EdinburghNLP/xsum", "refs/convert/parquet"));
    assert_snapshot!(case.host(&["validate", "c.yaml", xsum[0], "dataset.split=train+test"]), @"
    exit 0
    --- stdout
    Config is well-formed!
    --- stderr
    notice: 1 files of `EdinburghNLP/xsum` are not in the cache; a run fetches them from the hub (3.87 KiB) (command line)
    ");
}

#[test]
fn a_data_sets_own_files() {
    let case = Case::new().with_config();
    let hub = case.hub();
    let add = |files: &[(&'static str, &[u8])]| {
        hub.add("datasets/org/rows", Access::Public, "main", files.iter().map(|(path, bytes)| (*path, bytes.to_vec())));
    };
    // By names.
    add(&[("train.jsonl", ROW), ("test.jsonl", ROW), ("dataset_infos.json", b"{}")]);
    assert_eq!(case.plan(&[]).0, ["train:train.jsonl"]);
    assert_eq!(case.plan(&["dataset.split=train+test[:1]"]).0, ["train:train.jsonl", "test:test.jsonl"]);
    // By patterns of the config.
    let long = [ROW, &[b'\n'; 2000]].concat();
    add(&[("a/1.csv", b"input,output\n"), ("a/2.csv", &long), ("a/b/3.csv", b"x"), ("b/1.csv", b"y")]);
    assert_eq!(case.plan(&["dataset.data_files=a/*.csv"]).0, ["train:a/1.csv", "train:a/2.csv"]);
    assert_eq!(case.plan(&["dataset.data_files={train: b/1.csv}"]).0, ["train:b/1.csv"]);
    assert_eq!(case.plan(&["dataset.name=b"]).0, ["train:b/1.csv"]);
    // By the card.
    let card = b"---\nconfigs:\n- config_name: en\n  data_files:\n  - split: train\n    path: en/*.jsonl\n- config_name: de\n  \
        data_files: de.jsonl\n---\n# Rows\n";
    add(&[("README.md", card), ("en/x.jsonl", ROW), ("en/y.jsonl", ROW), ("de.jsonl", ROW)]);
    assert_eq!(case.plan(&["dataset.name=en"]).0, ["train:en/x.jsonl", "train:en/y.jsonl"]);
    assert_eq!(case.plan(&["dataset.name=de"]).0, ["train:de.jsonl"]);
    assert_snapshot!(case.run(&[]), @"
    exit 2
    --- stderr
    error: the data set `org/rows` has several subsets
      --> c.yaml:15:11
    hint: give `name`, one of: de, en
    ");
    // At a commit: nothing is asked when it is cached.
    let commit = hub.commit("datasets/org/rows", "main");
    let pinned = format!("dataset.revision={commit}");
    assert_eq!(case.plan(&["dataset.name=de", &pinned]).0, ["train:de.jsonl"]);
    hub.asked();
    case.run(&["dataset.name=de", &pinned]);
    assert_eq!(hub.asked().len(), 0);
}

#[test]
fn a_conversion_that_is_cut_off_is_not_taken() {
    let case = Case::new().with_config();
    let hub = case.hub();
    hub.add("datasets/org/rows", Access::Public, "main", [("train.jsonl", ROW.to_vec())]);
    let conversion = "refs/convert/parquet";
    hub.add("datasets/org/rows", Access::Public, conversion, [("default/partial-train/0000.parquet", xsum(0..3))]);
    assert_eq!(case.plan(&[]).0, ["train:train.jsonl"]);
    let subsets = [("b/train/0000.parquet", xsum(0..3)), ("a/train/0000.parquet", xsum(0..4))];
    hub.add("datasets/org/rows", Access::Public, conversion, subsets);
    assert_eq!(case.plan(&["dataset.name=a"]).0, ["train:a/train/0000.parquet"]);
    assert_snapshot!(case.run(&[]), @"
    exit 2
    --- stderr
    error: the data set `org/rows` has several subsets
      --> c.yaml:15:11
    hint: give `name`, one of: a, b
    ");
    assert_snapshot!(case.run(&["dataset.name=c"]), @"
    exit 2
    --- stderr
    error: the data set `org/rows` has no subset `c`
      --> command line
    hint: give `name`, one of: a, b
    ");
}

#[test]
fn data_sets_that_cannot_be_read() {
    let mut case = Case::new().with_config();
    let hub = case.hub();
    assert_snapshot!(case.run(&[]), @"
    exit 2
    --- stderr
    error: the hub has no data set `org/rows`, or none that may be seen
      --> c.yaml:15:11
    cause: the hub answered 401 Unauthorized: Invalid username or password.
    hint: check the name, capital letters too
    hint: if it is private, give a token: `--hf-token`, HF_TOKEN or `hf auth login`
    hint: there is no folder `org/rows` here either
    ");
    let rows = "datasets/org/rows";
    hub.add(rows, Access::Public, "main", [("rows.py", b"import os".to_vec()), ("rows.zip", vec![1])]);
    assert_snapshot!(case.run(&[]), @"
    exit 2
    --- stderr
    error: the data set `org/rows` has no file that can be read
      --> c.yaml:15:11
    cause: its rows are made by the program `rows.py`, which is never run, and the hub has not converted all of them
    hint: make its rows into jsonl files yourself, and give their folder
    ");
    hub.add(rows, Access::Public, "main", [("train.jsonl", ROW.to_vec())]);
    assert_snapshot!(case.run(&["dataset.split=validation[:5]"]), @"
    exit 2
    --- stderr
    error: the data set `org/rows` has no split `validation`
      --> command line
    hint: it has: train
    ");
    assert_snapshot!(case.run(&["dataset.data_files=*.csv"]), @"
    exit 2
    --- stderr
    error: no file of the data set `org/rows` matches `*.csv`
      --> command line
    ");
    assert_snapshot!(case.run(&["dataset.revision=v2"]), @"
    exit 2
    --- stderr
    error: the data set `org/rows` has no revision `v2`
      --> command line
    cause: the hub answered 404 Not Found: Invalid rev id: v2
    hint: its branches, tags and commits are on HUB/datasets/org/rows
    ");
    assert_snapshot!(case.run(&["dataset.revision='a b'"]), @"
    exit 2
    --- stderr
    error: `a b` is not a revision
      --> command line
    hint: a revision is a branch, a tag or a commit, such as `main`
    ");
    hub.add(rows, Access::Gated, "main", [("train.jsonl", ROW.to_vec())]);
    assert_snapshot!(case.run(&[]), @"
    exit 2
    --- stderr
    error: the data set `org/rows` is gated, and no token was given
      --> c.yaml:15:11
    cause: the hub answered 401 Unauthorized: Access to this model is restricted. You must have access to it and be authenticated.
    hint: ask for access on HUB/datasets/org/rows
    hint: then make a token on HUB/settings/tokens and give it as `--hf-token`, HF_TOKEN or by `hf auth login`
    ");
    drop(case.hub.take());
    assert_snapshot!(case.run(&["dataset.source=org/other"]), @"
    exit 1
    --- stderr
    error: cannot reach the hub at `HUB`
      --> command line
    cause: io: Connection refused (os error 111)
    hint: check the network; HTTPS_PROXY names a proxy, SSL_CERT_FILE its certificates, HF_ENDPOINT a mirror
    hint: nothing of `org/other` is in the cache
    ");
}
