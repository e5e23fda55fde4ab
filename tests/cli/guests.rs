//! What guests say of themselves: mistakes in it, and configs held against it.

use host::config::metadata::{KeyType, Metadata};
use host::guest::{self, SECTION};
use insta::assert_snapshot;

use super::Case;

const LOSS: &str = r#"//! Focal loss.
//!
//! ```toml
//! version = "0.1.0"
//! license = "MIT"
//!
//! [keys.gamma]
//! type = "num"
//! default = 2
//! min = 0.0
//! doc = "how much less sure tokens count"
//!
//! [keys.reduce]
//! type = "text"
//! choices = ["labels", "tokens"]
//!
//! [keys.places]
//! type = "int"
//! required = true
//! min = 1
//! max = 9
//!
//! [keys.smooth]
//! type = "flag"
//! default = false
//! ```

fn loss(logits, labels, settings) { #{ sum: logits.sum(), weight: 1 } }
"#;

/// A case with the guest `own.rhai` as its loss.
fn with_loss(text: &str) -> Case {
    let case = Case::edited(&[("  _component_: cross_entropy", "  _component_: own.rhai")]);
    case.write("own.rhai", text);
    case
}

/// A script whose metadata is `toml`, as `validate` reads it.
fn broken(toml: &str) -> String {
    let lines: String = toml.lines().map(|line| format!("//! {line}\n")).collect();
    with_loss(&format!("//! A loss.\n//!\n//! ```toml\n{lines}//! ```\n")).validate(&[])
}

#[test]
fn a_value_of_the_wrong_type_is_one_clear_message() {
    assert_snapshot!(broken("version = 3"), @r#"
    exit 2
    --- stderr
    error: the metadata's `version` must be a text, found the number `3`
      --> own.rhai:4:15
    hint: `version = "…"`
    "#);
    assert_snapshot!(broken("[keys.gamma]\ntype = \"num\"\ndefault = \"high\""), @"
    exit 2
    --- stderr
    error: the metadata's `keys.gamma.default` must be a number, found the text `high`
      --> own.rhai:6:15
    hint: the key's type is `num`
    ");
    assert_snapshot!(broken("[keys.gamma]\ntype = \"float\""), @r#"
    exit 2
    --- stderr
    error: the metadata's `keys.gamma.type` must be one of `flag`, `int`, `num`, `text`, found the text `float`
      --> own.rhai:5:12
    hint: `type = "num"`
    "#);
    assert_snapshot!(broken("keys = [\"gamma\"]"), @r#"
    exit 2
    --- stderr
    error: the metadata's `keys` must be a table, found a list
      --> own.rhai:4:12
    hint: `[keys.gamma]`, then `type = "num"`
    "#);
}

#[test]
fn every_mistake_in_metadata_is_said_by_line() {
    assert_snapshot!(broken("versoin = \"1\"\n[keys.gamma]\ntype = \"num\"\ndefautl = 1.0\n[keys.Beta]\ntype = \"int\""), @"
    exit 2
    --- stderr
    error: metadata has no field `versoin`
      --> own.rhai:4:5
    hint: did you mean `version`?

    error: a key has no field `defautl`
      --> own.rhai:7:5
    hint: did you mean `default`?

    error: a key cannot be called `Beta`
      --> own.rhai:8:11
    hint: its name is lower-case letters, digits and `_`, at most 64
    ");
    assert_snapshot!(broken("[keys.a]\ntype = \"int\"\nmin = 3\nmax = 1\n[keys.b]\ntype = \"text\"\nmin = 1"), @"
    exit 2
    --- stderr
    error: the key `a` is at least 3 and at most 1
      --> own.rhai:4:11
    hint: swap `min` and `max`

    error: `keys.b.min` bounds a text, which has no order
      --> own.rhai:10:11
    hint: remove `min`
    ");
    assert_snapshot!(broken("[keys.a]\ntype = \"num\"\nmin = 0.0\ndefault = -1.0\n[keys.b]\ndefault = 1"), @"
    exit 2
    --- stderr
    error: `keys.a.default` must be a number, at least 0.0, found -1.0
      --> own.rhai:7:15
    hint: a default is what a config may write too

    error: the key `b` has no `type`
      --> own.rhai:8:11
    hint: it is one of `flag`, `int`, `num`, `text`
    ");
    assert_snapshot!(broken("[keys.a]\ntype = \"num\"\nrequired = true\ndefault = 1"), @"
    exit 2
    --- stderr
    error: the key `a` is required and has a default
      --> own.rhai:4:11
    hint: remove `required` or `default`
    ");
    assert_snapshot!(broken("[keys.a]\ntype = \"text\"\ndefault = \"a\\u001bb\""), @r#"
    exit 2
    --- stderr
    error: `keys.a.default` holds the control character `\u{1b}`
      --> own.rhai:6:15
    hint: a text is letters, digits and signs
    "#);
    assert_snapshot!(broken("name ="), @"
    exit 2
    --- stderr
    error: the metadata of `own.rhai` is not TOML
      --> own.rhai:4:11
    cause: string values must be quoted, expected literal string
    ");
    assert_snapshot!(with_loss("//! ```toml\n//! name = \"a\"\n\nfn loss(a, b) {}").validate(&[]), @"
    exit 2
    --- stderr
    error: the metadata of `own.rhai` has no end
      --> own.rhai:1
    hint: a line of `//!` and three backticks ends the block
    ");
    assert_snapshot!(with_loss("//! ```toml\n//! ```\n//! ```toml\n//! ```\n").validate(&[]), @"
    exit 2
    --- stderr
    error: `own.rhai` has more than one block of metadata
      --> own.rhai:3
    hint: put all of it into the first
    ");
    let long = format!("doc = \"{}\"", "a".repeat(70_000));
    assert_snapshot!(broken(&long), @"
    exit 2
    --- stderr
    error: the metadata of `own.rhai` has 70009 bytes, and it may have 65536
    ");
}

#[test]
fn a_loss_is_given_its_own_keys_and_no_others() {
    let case = with_loss(LOSS);
    assert_snapshot!(case.validate(&["loss.places=0", "loss.gama=1", "loss.smooth=yes please", "loss.reduce=all"]), @"
    exit 2
    --- stderr
    error: unknown key `loss.gama`
      --> command line
    hint: did you mean `loss.gamma`?

    error: `loss.reduce` must be one of `labels`, `tokens`, found the text `all`
      --> command line

    error: `loss.places` must be a whole number from 1 to 9, found the number `0`
      --> command line

    error: `loss.smooth` must be `True` or `False`, found the text `yes please`
      --> command line
    ");
    assert_snapshot!(case.validate(&["loss.gamma=[1]"]), @"
    exit 2
    --- stderr
    error: `loss.gamma` must be a number, at least 0.0, found a list
      --> command line
    hint: `loss.gamma`: how much less sure tokens count

    error: the key `loss.places` is missing
      --> c.yaml:24:3
    hint: `loss.places` is a whole number from 1 to 9
    ");
    let json = case.validate(&["--json", "loss.places=3", "loss.gamma=1"]);
    let value: serde_json::Value = serde_json::from_str(json.strip_prefix("exit 0\n--- stdout\n").unwrap()).unwrap();
    let plan = &value["plan"]["train"];
    assert_snapshot!(plan["loss"]["guest"]["settings"], @r#"{"places":3,"gamma":1.0,"reduce":null,"smooth":false}"#);
    // What the checkpoints say of the run has them too.
    assert!(plan["resolved_yaml"].as_str().unwrap().contains("  smooth: false\n"));
    // Of a guest that names none nothing is known.
    let case = with_loss("fn loss(logits, labels, settings) { #{ sum: logits.sum(), weight: 1 } }");
    assert_snapshot!(case.validate(&["loss.anything=1"]), @"
    exit 0
    --- stdout
    Config is well-formed!
    ");
}

#[test]
fn a_template_is_given_its_own_keys_wherever_it_is_named() {
    let case = Case::new();
    let keys = "[keys.language]\ntype = \"text\"\nrequired = true\n[keys.share]\ntype = \"num\"\ndefault = 1\n";
    let metadata: String = keys.lines().map(|line| format!("//! {line}\n")).collect();
    case.write("own.rhai", format!("//! ```toml\n{metadata}//! ```\nfn render(row, settings) {{ [] }}\n"));
    assert_snapshot!(case.validate(&["tokenizer.prompt_template=own.rhai"]), @"
    exit 2
    --- stderr
    error: the key `tokenizer.prompt_template.language` is missing
      --> command line
    hint: `tokenizer.prompt_template.language` is a text
    ");
    let wrong = "tokenizer.prompt_template={_component_: own.rhai, language: de, share: all, sharp: 1}";
    assert_snapshot!(case.validate(&[wrong]), @"
    exit 2
    --- stderr
    error: unknown key `tokenizer.prompt_template.sharp`
      --> command line
    hint: did you mean `tokenizer.prompt_template.share`?

    error: `tokenizer.prompt_template.share` must be a number, found the text `all`
      --> command line
    ");
    let right = "tokenizer.prompt_template={_component_: own.rhai, language: de}";
    let json = case.validate(&["--json", right]);
    let value: serde_json::Value = serde_json::from_str(json.strip_prefix("exit 0\n--- stdout\n").unwrap()).unwrap();
    let settings = &value["plan"]["train"]["tokenizer"]["prompt_template"]["settings"];
    assert_snapshot!(settings, @r#"{"language":"de","share":1.0}"#);
    // Of one that names none nothing is known, but that they are single values; names of ours take none.
    case.write("own.rhai", "fn render(row, settings) { [] }");
    assert_snapshot!(case.validate(&["tokenizer.prompt_template={_component_: own.rhai, a: 1, b: [2], c: .inf}"]), @"
    exit 2
    --- stderr
    error: `tokenizer.prompt_template.b` must be a text, a flag or a finite number, found a list
      --> command line
    hint: a guest's settings are single values

    error: `tokenizer.prompt_template.c` must be a text, a flag or a finite number, found the number `.inf`
      --> command line
    hint: a guest's settings are single values
    ");
    assert_snapshot!(case.validate(&["tokenizer.prompt_template={_component_: SummarizeTemplate, a: 1}"]), @"
    exit 2
    --- stderr
    error: `tokenizer.prompt_template.a`: `SummarizeTemplate` takes no settings
      --> command line
    hint: copy the template with `host cp` and change the copy
    ");
}

#[test]
fn a_recipe_has_keys_at_the_top_of_a_config() {
    let case = Case::new();
    let recipe = "//! ```toml\n//! [keys.kl_share]\n//! type = \"num\"\n//! default = 0.5\n//! max = 1.0\n//! ```\n";
    case.write("own.rhai", recipe);
    assert_snapshot!(case.validate(&["kl_share=0.1"]), @"
    exit 2
    --- stderr
    error: unknown key `kl_share`
      --> command line
    hint: keys of the config: output_dir, tokenizer, dataset, dataset_val, run_val_every_n_steps, seed, shuffle, batch_size, gradient_accumulation_steps, epochs, max_steps_per_epoch, model, checkpointer, resume_from_checkpoint, resume_from, save_adapter_weights_only, save_every_n_steps, optimizer, lr_scheduler, loss, ref_checkpointer, teacher_model, teacher_checkpointer, kd_loss, kd_ratio, clip_grad_norm, device, dtype, metric_logger, log_every_n_steps, log_peak_memory_stats, log_level, enable_activation_checkpointing, ac_mode, ac_option, fsdp_cpu_offload, fsdp_reshard_after_forward, data_parallel_shard_dim, data_parallel_replicate_dim, parallel, layout, tokens_per_microbatch, compat, recipe, limits, isolate, cache_dir, distributed_backend, collective_timeout_seconds, profiler
    ");
    assert_snapshot!(case.validate(&["--recipe", "own.rhai", "kl_share=0.1"]), @"
    exit 0
    --- stdout
    Config is well-formed!
    ");
    assert_snapshot!(case.validate(&["--recipe", "own.rhai", "kl_share=3", "recipe.kl_share=1"]), @"
    exit 2
    --- stderr
    error: the recipe `own.rhai` names its keys, and reads no `recipe`
      --> command line
    hint: set them at the top of the config: `kl_share`

    error: `kl_share` must be a number, at most 1.0, found the number `3`
      --> command line
    ");
    assert_snapshot!(case.validate(&["--recipe", "own.rhai", "kl_shar=0.3"]), @"
    exit 2
    --- stderr
    error: unknown key `kl_shar`
      --> command line
    hint: did you mean `kl_share`?
    ");
    let json = case.validate(&["--json", "--recipe", "own.rhai"]);
    assert!(json.contains("kl_share: 0.5\\n"), "{json}");
    case.write("own.rhai", "//! ```toml\n//! [keys.seed]\n//! type = \"int\"\n//! ```\n");
    assert_snapshot!(case.validate(&["--recipe", "own.rhai"]), @"
    exit 2
    --- stderr
    error: the recipe `own.rhai` calls a key of its own `seed`
    cause: the host has a key of that name
    hint: give it another name
    ");
}

/// A component with nothing but custom sections.
fn component(sections: &[(&str, &[u8])]) -> Vec<u8> {
    let mut bytes = super::COMPONENT.to_vec();
    for (name, data) in sections {
        let size = 1 + name.len() + data.len();
        assert!(name.len() < 128 && size < 1 << 14);
        bytes.extend([0, size as u8 & 0x7f | 0x80, (size >> 7) as u8, name.len() as u8]);
        bytes.extend_from_slice(name.as_bytes());
        bytes.extend_from_slice(data);
    }
    bytes
}

fn of_component(sections: &[(&str, &[u8])]) -> Result<Metadata, String> {
    guest::metadata_of("own.wasm".as_ref(), &component(sections)).map_err(|error| error.to_string())
}

#[test]
fn a_components_metadata_is_a_section_with_its_authors_line() {
    let text = b"# src/lib.rs:40\n\nversion = \"1.0\"\n[keys.gamma]\ntype = \"num\"\n";
    let metadata = of_component(&[("name", b""), (SECTION, text)]).unwrap();
    assert_eq!((metadata.version.as_deref(), metadata.keys[0].ty), (Some("1.0"), KeyType::Num));
    assert_snapshot!(of_component(&[(SECTION, b"# src/lib.rs:40\n\nversion = 1\n")]).unwrap_err(), @r#"
    error: the metadata's `version` must be a text, found the number `1`
      --> src/lib.rs:41:11
    hint: `version = "…"`
    "#);
    assert_snapshot!(of_component(&[(SECTION, b"version = 1\n")]).unwrap_err(), @r#"
    error: the metadata's `version` must be a text, found the number `1`
      --> own.wasm:1:11
    hint: `version = "…"`
    "#);
    assert_snapshot!(of_component(&[(SECTION, b""), (SECTION, b"")]).unwrap_err(), @"
    error: cannot read the metadata of `own.wasm`
    cause: it has more than one section `host:meta`
    hint: call `host_sdk::metadata!` once, in the crate of the guest
    ");
    assert_snapshot!(of_component(&[(SECTION, b"\xff")]).unwrap_err(), @"
    error: cannot read the metadata of `own.wasm`
    cause: the section `host:meta` is no text: invalid utf-8 sequence of 1 bytes from index 0
    ");
}

#[test]
fn a_new_guest_needs_a_name_and_a_place_of_its_own() {
    let case = Case::new();
    assert_snapshot!(case.host(&["new", "template", "Mine-2"]), @"
    exit 2
    --- stderr
    error: a guest cannot be called `Mine-2`
    hint: its name is lower-case letters, digits and `_`, at most 64
    ");
    assert_snapshot!(case.host(&["new", "template", "model"]), @"
    exit 2
    --- stderr
    error: `model` is there already
    hint: give another name, or `--dir FOLDER`
    ");
    assert_snapshot!(case.host(&["new", "tempate", "mine"]), @"
    exit 2
    --- stderr
    error: invalid value 'tempate' for '<KIND>'
      [possible values: recipe, template, loss]

      tip: a similar value exists: 'template'

    For more information, try '--help'.
    ");
    assert_snapshot!(case.host(&["new", "loss", "mine", "--dir", "guests/my: own"]), @"
    exit 0
    --- stdout
    guests/my: own/mine holds a new loss. Next:
      host check 'guests/my: own/mine/mine.rhai'
      host test 'guests/my: own/mine'
      host preview --config 'guests/my: own/mine/config.yaml' checkpointer.checkpoint_dir=MODEL
      host run lora_distributed --nproc 2 --config 'guests/my: own/mine/config.yaml' checkpointer.checkpoint_dir=MODEL
    ");
    assert_snapshot!(case.host(&["validate", "guests/my: own/mine/config.yaml"]), @"
    exit 0
    --- stdout
    Config is well-formed!
    ");
    // The SDK is the repository's, byte for byte, and nothing but the guest is made.
    let sdk = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../sdk");
    case.host(&["new", "loss", "rusty", "--lang", "rust"]);
    for name in ["README.md", "REFERENCE.md", "rust/Cargo.toml", "rust/src/lib.rs", "rust/src/metadata.rs"] {
        let copied = std::fs::read(case.path().join("rusty/sdk").join(name)).unwrap();
        assert_eq!(copied, std::fs::read(sdk.join(name)).unwrap(), "{name}");
    }
    let names = std::fs::read_dir(case.path()).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    assert!(!names.into_iter().any(|name| name.starts_with(".host-new")));
}

#[test]
fn a_test_needs_a_guest() {
    let case = Case::new();
    assert_snapshot!(case.host(&["test", "model"]), @"
    exit 2
    --- stderr
    error: the folder `model` holds no guest
    hint: a guest is a .rhai or .wasm file; `host new` makes a folder with one
    ");
    assert_snapshot!(case.host(&["test", "."]), @"
    exit 2
    --- stderr
    error: the folder `.` holds no guest
    hint: a guest is a .rhai or .wasm file; `host new` makes a folder with one
    ");
    case.write("a.rhai", "");
    case.write("b.wasm", "");
    assert_snapshot!(case.host(&["test", "."]), @"
    exit 2
    --- stderr
    error: the folder `.` holds several guests
    cause: `./a.rhai`, `./b.wasm`
    hint: name one of the files
    ");
    case.host(&["new", "loss", "rusty", "--lang", "rust"]);
    assert_snapshot!(case.host(&["test", "rusty"]), @"
    exit 2
    --- stderr
    error: the guest in `rusty` is not built: no `rusty/target/wasm32-wasip2/release/rusty.wasm`
    hint: `(cd rusty && cargo build --release)` builds it
    ");
    assert_snapshot!(case.host(&["test", "a.rhai", "--accept"]), @"
    exit 2
    --- stderr
    error: `a.rhai` has no rows to accept
    hint: put rows into `tests/rows.jsonl` of the guest's folder
    ");
}

mod properties {
    use proptest::prelude::*;

    use super::*;

    /// A key as TOML, and whether its author made a mistake in it.
    fn key() -> impl Strategy<Value = (String, bool)> {
        let value = prop_oneof![
            (-99i64..99).prop_map(|value| ("int", value.to_string())),
            (-9.0..9.0f64).prop_map(|value| ("num", format!("{value:?}"))),
            any::<bool>().prop_map(|value| ("flag", value.to_string())),
            "[a-zé ]{0,9}".prop_map(|value| ("text", format!("{value:?}"))),
        ];
        let ty = prop::sample::select(vec!["int", "num", "flag", "text"]);
        (value, ty).prop_map(|((of, value), ty)| {
            // A whole number is a number too.
            let fits = of == ty || (of, ty) == ("int", "num");
            (format!("type = {ty:?}\ndefault = {value}\n"), !fits)
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(400) })]

        /// Keys are read as they were written, in that order, in both forms; each default of the wrong type is one mistake.
        #[test]
        fn keys_are_what_was_written(keys in prop::collection::btree_map("[a-z][a-z0-9_]{0,20}", key(), 0..8)) {
            let toml: String = keys.iter().rev().map(|(name, (fields, _))| format!("[keys.{name}]\n{fields}")).collect();
            let script: String = toml.lines().map(|line| format!("//! {line}\n")).collect();
            let script = format!("//! A guest.\n//!\n//! ```toml\n{script}//! ```\n");
            let wrong = keys.values().filter(|(_, is_wrong)| *is_wrong).count();
            let of_script = guest::metadata_of("own.rhai".as_ref(), script.as_bytes());
            let of_component =
                guest::metadata_of("own.wasm".as_ref(), &component(&[(SECTION, toml.as_bytes())]));
            match (of_script, of_component) {
                (Ok(script), Ok(component)) => {
                    prop_assert_eq!(wrong, 0);
                    prop_assert_eq!(&script.keys, &component.keys);
                    let names: Vec<_> = script.keys.iter().map(|key| key.name.as_str()).collect();
                    prop_assert_eq!(names, keys.keys().rev().map(String::as_str).collect::<Vec<_>>());
                    for key in &script.keys {
                        prop_assert!(key.default.as_ref().is_some_and(|default| key.fit(default).as_ref() == Some(default)));
                    }
                }
                (Err(script), Err(component)) => {
                    prop_assert_eq!(1 + script.others.len(), wrong);
                    prop_assert_eq!(1 + component.others.len(), wrong);
                }
                (script, component) => prop_assert!(false, "{:?} and {:?}", script, component),
            }
        }

        /// Whatever stands there is metadata or one error with the guest's name.
        #[test]
        fn anything_is_metadata_or_an_error(
            noise in prop_oneof![
                "[\\[\\]a-z\"'=.{}, 0-9\n#-]{0,200}",
                r#"(name|version|keys|keys\.a|\[keys\.a\]|type|min|choices) ?= ?("a"|1|-2\.5e400|nan|99999999999999999999|\[1, "b"\]|\{\}|1979-05-27)\n"#,
            ],
            bytes in prop::collection::vec(any::<u8>(), 0..200),
        ) {
            let script: String = noise.lines().map(|line| format!("//! {line}\n")).collect();
            let whole = component(&[(SECTION, noise.as_bytes())]);
            let files = [
                ("own.rhai", format!("//! ```toml\n{script}//! ```\n").into_bytes()),
                ("own.rhai", format!("//! {noise}").into_bytes()),
                ("own.wasm", whole.clone()),
                ("own.wasm", component(&[(SECTION, &bytes)])),
                ("own.wasm", [super::super::COMPONENT, &bytes].concat()),
                ("own.wasm", whole[..whole.len() - whole.len() / 3].to_vec()),
            ];
            for (name, content) in files {
                if let Err(error) = guest::metadata_of(name.as_ref(), &content) {
                    prop_assert_eq!(error.kind, host::error::Kind::Config);
                    prop_assert!(error.to_string().contains("own."), "{}", error);
                }
            }
        }
    }
}
