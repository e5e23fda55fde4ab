//! The author's kit: what `host new` makes works at once, what `host test` finds, and `sdk/README.md` word for word.

use std::path::Path;
use std::process::Command;

use host_rank::script::SDK_VERSION;
use insta::assert_snapshot;

use crate::case::{Case, Ended, root};

/// Runs cargo in a folder of the case, without network: what a guest needs was fetched with the shipped guests.
fn build(case: &Case, guest: &str) -> Ended {
    let mut cargo = Command::new(env!("CARGO"));
    case.prepare(&mut cargo);
    for (name, value) in offline(case) {
        cargo.env(name, value);
    }
    whole(cargo.args(["build", "--release", "--quiet"]).current_dir(case.path(guest)))
}

/// Runs a command for as long as it takes: a build may wait for others on the machine.
fn whole(command: &mut Command) -> Ended {
    let output = command.output().unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    Ended { code: output.status.code().unwrap(), stdout: text(&output.stdout), stderr: text(&output.stderr) }
}

/// One build folder for all guests of the case, and none of this crate's own settings for cargo.
fn offline(case: &Case) -> [(&'static str, String); 2] {
    [("CARGO_TARGET_DIR", case.path("built").display().to_string()), ("CARGO_NET_OFFLINE", "true".to_owned())]
}

fn host(case: &Case, arguments: &[&str]) -> Ended {
    Ended::of(case.host(arguments).envs(offline(case)))
}

/// What was used of each limit differs from machine to machine.
fn without_use(text: &str) -> String {
    let end = text.find("\nused ").unwrap_or(text.len());
    text[..end].to_owned()
}

/// Without what the next version and another machine have otherwise.
fn lasting(text: &str) -> String {
    let line = |line: &str| match line.split_once("losses ") {
        Some((before, losses)) if losses.starts_with(|c: char| c.is_ascii_digit()) => {
            format!("{before}losses [LOSSES]\n")
        }
        _ => format!("{line}\n"),
    };
    text.lines().map(line).collect::<String>().replace(SDK_VERSION, "[SDK]")
}

#[test]
fn what_is_new_works_in_both_languages() {
    let case = Case::new();
    let mut said = String::new();
    for kind in ["template", "loss", "recipe"] {
        let mut results = vec![];
        for language in ["rhai", "rust"] {
            let name = format!("{kind}_in_{language}");
            let made = host(&case, &["new", kind, &name, "--lang", language]);
            assert_eq!(made.code, 0, "{}", made.stderr);
            let mut file = format!("{name}/{name}.rhai");
            if language == "rust" {
                let built = build(&case, &name);
                assert_eq!(built.code, 0, "{}", built.stderr);
                file = format!("built/wasm32-wasip2/release/{name}.wasm");
            }
            let checked = host(&case, &["check", &file]);
            assert_eq!(checked.code, 0, "{}", checked.stderr);
            let tested = host(&case, &["test", &name]);
            assert_eq!(tested.code, 0, "{}", tested.stderr);
            let json = host(&case, &["test", &name, "--json"]).stdout;
            let json: serde_json::Value = serde_json::from_str(&json).unwrap();
            let limits = json["limits"].as_object().unwrap();
            assert!(limits.values().all(|of| of["peak"].as_f64() <= of["limit"].as_f64()), "{json}");
            assert!(kind == "template" || limits["handles"]["peak"].as_f64() > Some(2.0), "{json}");
            assert_eq!(limits.contains_key("memory"), language == "rust");
            results.push(without_use(&tested.stdout).split_once('\n').unwrap().1.replace(&name, "[NAME]"));
            let checked = checked.stdout.replace(&case.path("").display().to_string(), "");
            said += &format!(
                "{checked}{}\n",
                without_use(&tested.stdout).replace(&*case.path("built").to_string_lossy(), "built")
            );
        }
        assert_eq!(results[0], results[1], "the same in both languages");
    }
    assert_snapshot!(lasting(&said), @"
    template_in_rhai/template_in_rhai.rhai: a template, Rhai script
    host:sdk   [SDK], and all that it uses is granted
    functions  configure(columns)
               render(row)
    template_in_rhai/template_in_rhai.rhai: a template
    ok         2 rows are as `template_in_rhai/tests/rows.jsonl` says
    built/wasm32-wasip2/release/template_in_rust.wasm: a template, Wasm component
    host:sdk   [SDK], and all that it uses is granted
    built/wasm32-wasip2/release/template_in_rust.wasm: a template
    ok         2 rows are as `template_in_rust/tests/rows.jsonl` says
    loss_in_rhai/loss_in_rhai.rhai: a loss, Rhai script
    host:sdk   [SDK], and all that it uses is granted
    keys       share = 0.1: a number from 0.0 to 1.0; of the target, what goes to all tokens alike; 0 is cross-entropy
    functions  loss(logits, labels, settings)
    loss_in_rhai/loss_in_rhai.rhai: a loss
    ok         2 rows are as `loss_in_rhai/tests/rows.jsonl` says
    ok         gradients are numbers; sums and weights add up over the halves of a batch
    built/wasm32-wasip2/release/loss_in_rust.wasm: a loss, Wasm component
    host:sdk   [SDK], and all that it uses is granted
    keys       share = 0.1: a number from 0.0 to 1.0; of the target, what goes to all tokens alike; 0 is cross-entropy
    built/wasm32-wasip2/release/loss_in_rust.wasm: a loss
    ok         2 rows are as `loss_in_rust/tests/rows.jsonl` says
    ok         gradients are numbers; sums and weights add up over the halves of a batch
    recipe_in_rhai/recipe_in_rhai.rhai: a recipe, Rhai script
    host:sdk   [SDK], and all that it uses is granted
    keys       z_loss = 0.0001: a number, at least 0.0; how much the squared normaliser counts; 0 is cross-entropy alone
    recipe_in_rhai/recipe_in_rhai.rhai: a recipe
    ok         3 steps of a tiny model; losses [LOSSES]
    built/wasm32-wasip2/release/recipe_in_rust.wasm: a recipe, Wasm component
    host:sdk   [SDK], and all that it uses is granted
    keys       z_loss = 0.0001: a number, at least 0.0; how much the squared normaliser counts; 0 is cross-entropy alone
    built/wasm32-wasip2/release/recipe_in_rust.wasm: a recipe
    ok         3 steps of a tiny model; losses [LOSSES]
    ");
    // Metadata is read from the component, and its mistakes are at the author's own line.
    case.edit("loss_in_rust/src/lib.rs", "min = 0.0", "min = \"0\"");
    assert_eq!(build(&case, "loss_in_rust").code, 0);
    assert_snapshot!(host(&case, &["check", "built/wasm32-wasip2/release/loss_in_rust.wasm"]).stderr, @"
    error: the metadata's `keys.share.min` must be a number, found the text `0`
      --> src/lib.rs:34:7
    hint: the key's type is `num`
    ");
    let source = std::fs::read_to_string(case.path("loss_in_rust/src/lib.rs")).unwrap();
    assert_eq!(source.lines().position(|line| line == "min = \"0\""), Some(34 - 1));
}

#[test]
fn rows_that_become_something_else_are_shown() {
    let case = Case::new();
    assert_eq!(host(&case, &["new", "template", "mine"]).code, 0);
    case.edit("mine/mine.rhai", "in one line: ", "briefly: ");
    let rows = std::fs::read_to_string(case.path("mine/tests/rows.jsonl")).unwrap();
    case.write("mine/tests/rows.jsonl", rows + "{\"row\": {\"input\": \"a\"}, \"skip\": \"too short\"}\n");
    assert_snapshot!(host(&case, &["test", "mine"]).report(), @r#"
    exit 1
    error: a row becomes something else than is written down
      --> mine/tests/rows.jsonl:1
    cause: expected {"role":"user","parts":["Answer in one line: What does a parser do?"]}
    cause: got      {"role":"user","parts":["Answer briefly: What does a parser do?"]}
    hint: `--accept` writes down what comes of it

    error: a row becomes something else than is written down
      --> mine/tests/rows.jsonl:2
    cause: expected {"role":"user","parts":["Answer in one line: What does a linker do?"]}
    cause: got      {"role":"user","parts":["Answer briefly: What does a linker do?"]}
    hint: `--accept` writes down what comes of it

    error: a row becomes something else than is written down
      --> mine/tests/rows.jsonl:3
    cause: expected skip: "too short"
    cause: got      {"role":"user","parts":["Answer briefly: a"]}
    hint: `--accept` writes down what comes of it
    "#);
    let accepted = host(&case, &["test", "mine", "--accept"]);
    assert_snapshot!(without_use(&accepted.stdout), @"
    mine/mine.rhai: a template
    ok         3 rows are written to `mine/tests/rows.jsonl`
    ");
    assert_snapshot!(std::fs::read_to_string(case.path("mine/tests/rows.jsonl")).unwrap().lines().last().unwrap(), @r#"{"row":{"input":"a"},"messages":[{"role":"user","parts":["Answer briefly: a"]}]}"#);
    assert_eq!(host(&case, &["test", "mine/mine.rhai"]).code, 0);
    // What is wrong with the rows.
    case.write("mine/tests/rows.jsonl", "{\"row\": {\"input\": 3}}\n");
    assert_snapshot!(host(&case, &["test", "mine"]).report(), @"
    exit 2
    error: the template `mine/mine.rhai` wants a column `output`, which no row has
      --> mine/tests/rows.jsonl
    cause: there is `input`, `messages`
    ");
    case.write("mine/tests/rows.jsonl", "{\"row\": {\"question\": \"a\"}}\n");
    assert_snapshot!(host(&case, &["test", "mine"]).report(), @"
    exit 2
    error: the template `mine/mine.rhai` wants a column `input`, which no row has
      --> mine/tests/rows.jsonl
    cause: there is `question`
    ");
    case.write("mine/tests/rows.jsonl", "\n{\"row\":\n");
    assert_snapshot!(host(&case, &["test", "mine"]).report(), @"
    exit 2
    error: a row is not an object of JSON
      --> mine/tests/rows.jsonl:2:7
    cause: EOF while parsing a value
    ");
    case.write("mine/tests/rows.jsonl", "");
    assert_snapshot!(host(&case, &["test", "mine"]).report(), @"
    exit 2
    error: `mine/tests/rows.jsonl` has no rows
    hint: `host test --help` shows what a row is; `--accept` fills in what comes of it
    ");
}

#[test]
fn a_loss_keeps_what_every_run_asks_of_it() {
    let case = Case::new();
    let row =
        "{\"logits\": [[1.0, 2.0], [0.5, 0.0], [0.0, 3.0]], \"labels\": [1, 0, 1], \"sum\": 1.0, \"weight\": 1}\n";
    let tested = |script: &str| {
        case.write("mine/mine.rhai", script);
        case.write("mine/tests/rows.jsonl", row);
        host(&case, &["test", "mine", "--accept"]).report()
    };
    // A mean; a sum without a weight to go with it; a gradient that is not one; a setting that there is not.
    assert_snapshot!(tested("fn loss(logits, labels) { #{ sum: logits.logsumexp(-1).mean(), weight: 1 } }"), @"
    exit 1
    error: the loss depends on how labels are spread over batches
      --> mine/tests/rows.jsonl:1
    cause: whole: sum 2.1119754314422607, weight 1; in halves: sum 4.324593782424927, weight 2
    hint: give back a sum over the labels and their number, not a mean
    ");
    assert_snapshot!(tested("fn loss(logits, labels) { #{ sum: (logits * 0.0).sqrt().sum(), weight: labels.shape[0] } }"), @"
    exit 1
    error: the loss has a gradient that is no number
      --> mine/tests/rows.jsonl:1
    hint: look for a division by 0, a logarithm or a square root of 0
    ");
    assert_snapshot!(tested("fn loss(logits, labels) {\n    #{ sum: logits.somme(), weight: 1 }\n}"), @"
    exit 1
    error: loss `mine/mine.rhai` failed
      --> mine/mine.rhai:2:20
      --> mine/tests/rows.jsonl:1
    cause: no function `somme (Tensor)`
    ");
    case.write("mine/tests/rows.jsonl", "{\"logits\": [[1.0, 2.0]], \"labels\": [2]}\n");
    assert_snapshot!(host(&case, &["test", "mine"]).report(), @"
    exit 2
    error: `labels` is not a list of tokens, one for each list of `logits`
      --> mine/tests/rows.jsonl:1
    hint: `host test --help` shows what a row is
    ");
    case.write("mine/mine.rhai", "fn loss(logits, labels) { #{ sum: logits.sum(), weight: 1 } }");
    case.write("mine/tests/rows.jsonl", "{\"logits\": [[1.0, 2.0]], \"labels\": [1], \"sum\": 3.0, \"weight\": 1}\n");
    assert_snapshot!(host(&case, &["test", "mine"]).report(), @"
    exit 2
    error: no row has two labels, so nothing can be spread over batches
      --> mine/tests/rows.jsonl
    hint: add one
    ");
}

#[test]
fn a_recipe_fails_at_its_own_line() {
    let case = Case::new();
    assert_eq!(host(&case, &["new", "recipe", "mine"]).code, 0);
    assert_eq!(host(&case, &["test", "mine", "z_loss=0"]).code, 0);
    assert_snapshot!(host(&case, &["test", "mine", "z_loss=-1"]).report(), @"
    exit 2
    error: `z_loss` must be a number, at least 0.0, found the number `-1`
      --> command line
    hint: `z_loss`: how much the squared normaliser counts; 0 is cross-entropy alone
    ");
    case.edit("mine/mine.rhai", "logits.logsumexp(-1)", "logits.logsumexp(7)");
    let report = host(&case, &["test", "mine"]).report();
    assert_snapshot!(report, @"
    exit 1
    error: recipe `mine/mine.rhai` failed at step 1
      --> mine/mine.rhai:19:28
    cause: `logsumexp` over dimension 7, but shape [124, 258] has dimensions -2 to 1
    ");
}

/// The blocks of commands in a guide.
fn commands(guide: &Path) -> String {
    let text = std::fs::read_to_string(guide).unwrap();
    let blocks = text.split("\n```sh\n").skip(1).map(|rest| rest.split_once("\n```\n").unwrap().0);
    blocks.map(|block| format!("{block}\n")).collect()
}

#[test]
fn the_guide_does_what_it_says() {
    let case = Case::new();
    let script = commands(&root().join("sdk/README.md"));
    assert!(script.matches("--nproc 2").count() == 4 && script.matches("host preview").count() == 2, "{script}");
    let folder = case.path("empty");
    std::fs::create_dir(&folder).unwrap();
    let mut shell = Command::new("bash");
    case.prepare(&mut shell);
    let programs = Path::new(env!("CARGO_BIN_EXE_host-rank")).parent().unwrap();
    let path = std::env::join_paths(
        std::iter::once(programs.to_owned()).chain(std::env::split_paths(&std::env::var_os("PATH").unwrap())),
    );
    shell.args(["-e", "-u", "-o", "pipefail", "-c", &script]).current_dir(&folder);
    shell.env("PATH", path.unwrap()).env("MODEL", case.path("model")).env("CARGO_NET_OFFLINE", "true");
    let ended = whole(&mut shell);
    assert_eq!(ended.code, 0, "{}\n{}", ended.stdout, ended.stderr);
    for said in [
        "one_line/one_line.rhai: a template",
        "3 rows are written to `one_line/tests/rows.jsonl`",
        "\"skip\":\"the answer has more lines\"",
        "⟦",
        "one_line_rust.wasm: a template, Wasm component",
        "gamma = 2.0: a number, at least 0.0; how much less; 0 is cross-entropy",
        "Config is well-formed!",
        "3 steps of a tiny model",
    ] {
        assert!(ended.stdout.contains(said), "no `{said}` in\n{}", ended.stdout);
    }
    for guest in ["one_line", "one_line_rust", "unsure", "small_scores"] {
        let checkpoint = folder.join(guest).join("out/epoch_1/adapter/adapter_model.safetensors");
        assert!(checkpoint.is_file(), "{guest} trained nothing");
    }
}
