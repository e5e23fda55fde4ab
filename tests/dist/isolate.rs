//! `isolate: true` from the config to the templates, with the sandbox of this machine's kernel.

use insta::assert_snapshot;

use crate::case::{Case, Ended, RHAI_TEMPLATE, WASM};

/// Each from a cache of its own, so that the rows do go through the template.
#[test]
fn losses_do_not_depend_on_it() {
    let case = Case::new();
    let own = "dataset.template=scripts/templates/summarize.rhai";
    for template in [&[][..], &[RHAI_TEMPLATE], &[own, "tokenizer.prompt_template=null", "--nproc", "2"]] {
        let [here, isolated] = ["False", "True"].map(|isolate| {
            let name = format!("isolate_{isolate}_{}", template.len());
            let keys = [&format!("isolate={isolate}"), &format!("cache_dir={name}_cache")];
            case.losses(WASM, &name, &[template, &keys.map(String::as_str)].concat())
        });
        assert!(here == isolated && !here.is_empty(), "{template:?}: {here:?} {isolated:?}");
    }
}

#[test]
fn a_preview_and_a_prompt_are_the_same() {
    let case = Case::new();
    let verbs = [&["preview", "--config", "train.yaml"][..], &["run", "generate", "--config", "generate.yaml"]];
    for verb in verbs {
        let [here, isolated] = ["isolate=False", "isolate=True"].map(|isolate| {
            let ended = Ended::of(&mut case.host(&[verb, &[isolate]].concat()));
            assert_eq!(ended.code, 0, "{}", ended.stderr);
            ended.stdout
        });
        assert_eq!(here, isolated);
        assert!(!here.trim().is_empty());
    }
}

#[test]
fn a_template_that_takes_all_memory_ends_the_run_with_one_error() {
    let case = Case::new();
    let text = "fn render(row) {\n    let text = \"x\";\n    text.pad(500000, \"y\");\n    let held = #{};\n    \
                for i in 0..1000000 {\n        held[`k${i}`] = text + i;\n    }\n}";
    case.write("hoards.rhai", text);
    let keys = ["isolate=True", "limits.memory_mb=64", "tokenizer.prompt_template=hoards.rhai"];
    let ended = Ended::of(&mut case.run(WASM, &keys));
    assert_snapshot!(ended.report(), @"
    exit 1
    error: template `hoards.rhai` failed on row 0
    cause: Length of string too large
    ");
    assert!(!case.path("out").join("epoch_0").exists());
}
