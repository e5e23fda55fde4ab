//! What a script must not do, and what its author reads about it.

use host::config::plan::GuestLimits;
use host::data::template::Cell;
use host::worker::StopFlag;
use serde_json::json;

use crate::support::{Linear, run_with, script_error};

macro_rules! reports {
    ($($name:ident: $text:literal => $report:literal;)*) => {$(
        #[test]
        fn $name() {
            insta::assert_snapshot!(script_error($text), @$report);
        }
    )*};
}

reports! {
    loops: "let run = host::open();\nfor step in run.steps() {\n    loop { }\n}" => r#"
    error: recipe `[DIR]/recipe.rhai` failed at step 1
      --> [DIR]/recipe.rhai:3:10
    cause: the guest computed for more than 0.4 s without a turn of its loop
    hint: look for a loop that does not end; work on many numbers belongs into tensor operations
    "#;
    recurses: "fn deeper(n) {\n    deeper(n + 1)\n}\ndeeper(0);" => r#"
    error: recipe `[DIR]/recipe.rhai` failed before the first step
      --> [DIR]/recipe.rhai:4:1
    cause: Stack overflow
    "#;
    grows_a_string: "let s = \"x\";\nloop {\n    s += s;\n}" => r#"
    error: recipe `[DIR]/recipe.rhai` failed before the first step
      --> [DIR]/recipe.rhai:3:7
    cause: Length of string too large
    "#;
    grows_an_array: "let a = [1];\nloop {\n    a.push(a);\n}" => r#"
    error: recipe `[DIR]/recipe.rhai` failed before the first step
      --> [DIR]/recipe.rhai:3:7
    cause: Size of array/BLOB too large
    "#;
    evaluates: "eval(\"1\");" => r#"
    error: cannot read the script `[DIR]/recipe.rhai`
      --> [DIR]/recipe.rhai:1:1
    cause: reserved keyword 'eval' is disabled
    "#;
    imports: "import \"other\" as other;" => r#"
    error: cannot read the script `[DIR]/recipe.rhai`
      --> [DIR]/recipe.rhai:1:1
    cause: 'import' is a reserved keyword
    "#;
    unknown_function: "let run = host::open();\nlet model = run.model();" => r#"
    error: recipe `[DIR]/recipe.rhai` failed before the first step
      --> [DIR]/recipe.rhai:2:17
    cause: no function `model (Run)`
    hint: `model` is used as `run.model`
    "#;
    unknown_variable: "let run = host::open();\nrum.steps();" => r#"
    error: cannot read the script `[DIR]/recipe.rhai`
      --> [DIR]/recipe.rhai:2:1
    cause: Undefined variable: rum
    "#;
    wrong_argument: "let run = host::open();\nfor step in run.steps() {\n    step.backward(1.0, 2.0);\n}" => r#"
    error: recipe `[DIR]/recipe.rhai` failed at step 1
      --> [DIR]/recipe.rhai:3:10
    cause: no function `backward (Step, f64, f64)`
    hint: `backward` is used as `step.backward(sum, weight)`
    "#;
    throws_in_a_function: "fn inner(step) {\n    step.finish();\n}\nlet run = host::open();\nfor step in run.steps() {\n    inner(step);\n}" => r#"
    error: recipe `[DIR]/recipe.rhai` failed at step 1
      --> [DIR]/recipe.rhai:2:10
    cause: the step has batches that were not taken
    cause: in `inner`, called at line 6
    hint: take batches until `step.next_batch()` gives none, then finish
    "#;
    never_opens: "let x = 1;" => r#"
    error: recipe `[DIR]/recipe.rhai` failed before the first step
    cause: it returned without taking a step, so nothing is trained
    hint: take steps until `run.next_step()` gives none
    "#;
    hoards_tensors: "let run = host::open();\nfor step in run.steps() {\n    for batch in step.batches() {\n        let row = run.model.logits(batch).sum_dim(0);\n        let x = row.unsqueeze(1) * row;\n        x = x.unsqueeze(2).unsqueeze(3) * x;\n        x = x.unsqueeze(4) * row;\n        loop {\n            x = x + x;\n        }\n    }\n}" => r#"
    error: recipe `[DIR]/recipe.rhai` failed at step 1
      --> [DIR]/recipe.rhai:9:19
    cause: a tensor of shape [11, 11, 11, 11, 11] brings the guest's to 64 MiB, and their limit is 64 MiB
    hint: call `step.backward` for each batch, which frees what led to its sum; `limits.tensors_mb` raises the limit
    "#;
    adds_dimensions: "let run = host::open();\nlet step = run.next_step();\nlet x = step.next_batch().labels();\nloop {\n    x = x.unsqueeze(0);\n}" => r#"
    error: recipe `[DIR]/recipe.rhai` failed at step 1
      --> [DIR]/recipe.rhai:5:11
    cause: `unsqueeze` would make 65 dimensions, and a tensor has at most 64
    "#;
    hoards_handles: "let run = host::open();\nfor step in run.steps() {\n    for batch in step.batches() {\n        let held = [];\n        loop {\n            held.push(batch.labels());\n        }\n    }\n}" => r#"
    error: recipe `[DIR]/recipe.rhai` failed at step 1
      --> [DIR]/recipe.rhai:6:29
    cause: 2000 handles are held, and a guest may hold 2000
    hint: drop tensors that are no longer needed before making new ones
    "#;
    opens_twice: "host::open();\nhost::open();" => r#"
    error: recipe `[DIR]/recipe.rhai` failed before the first step
      --> [DIR]/recipe.rhai:2:7
    cause: the run is open already
    hint: call `open` once
    "#;
}

#[test]
fn operations_are_counted_between_turns() {
    let limits = GuestLimits { operations: 1_000_000, ..GuestLimits::default() };
    let report = |text: &str| {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("recipe.rhai");
        std::fs::write(&path, text).unwrap();
        let ended = run_with(path.to_str().unwrap(), &limits, Linear::new(json!({})), StopFlag::default());
        ended.map(|_| ()).map_err(|error| error.causes[0].clone())
    };
    let endless = "let run = host::open();\nfor step in run.steps() { loop { } }";
    assert_eq!(
        report(endless),
        Err("the script took more than 1000000 operations without a turn of its loop".to_owned())
    );
    // As many in each of five steps are fine.
    let busy = "let run = host::open();
        for step in run.steps() {
            for i in 0..50_000 { let x = i + 1; }
            while step.next_batch() != () { }
            step.finish();
        }";
    assert_eq!(report(busy), Ok(()));
}

#[test]
fn a_map_grows_until_the_time_is_up() {
    // Rhai does not look at a map's size when an entry is set by index: guest time is what bounds it.
    let report = script_error("let m = #{};\nlet i = 0;\nloop {\n    m[`k${i}`] = i;\n    i += 1;\n}");
    assert!(report.contains("the guest computed for more than 0.4 s"), "{report}");
}

/// What would take memory before it runs.
#[test]
fn a_script_has_no_more_names_than_it_needs() {
    let cause =
        |text: String| script_error(&text).lines().find_map(|line| Some(line.strip_prefix("cause: ")?.to_owned()));
    let many = |count: usize, item: &dyn Fn(usize) -> String| (0..count).map(item).collect::<String>();
    assert_eq!(cause(many(300, &|i| format!("let v{i} = {i};\n"))).unwrap(), "Too many variables defined");
    let functions = many(300, &|i| format!("fn f{i}() {{ {i} }}\n"));
    assert_eq!(cause(functions).unwrap(), "Number of functions defined exceeds maximum limit");
    let map = format!("let m = #{{ {} }};", many(5000, &|i| format!("k{i}: 0, ")));
    assert_eq!(cause(map).unwrap(), "Number of properties in object map literal exceeds the maximum limit (4096)");
    let array = format!("let a = [{}];", many(70_000, &|_| "0, ".to_owned()));
    assert_eq!(cause(array).unwrap(), "Size of array literal exceeds the maximum limit (65536)");
}

#[test]
fn depth_fits_a_small_stack() {
    // Templates run on the data workers' threads, whose stacks have 2 MiB.
    let nested = |depth: usize| format!("{}1{}", "(1 + ".repeat(depth), ")".repeat(depth));
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("t.rhai");
    let guest = crate::support::guest(&path);
    // The deepest expression that is let through, in a function that calls itself at the bottom of it.
    let open = |depth: usize| {
        let text = format!("fn render(n) {{ {} }}", nested(depth).replacen("1)", "render(n))", 1));
        std::fs::write(&path, text).unwrap();
        host_rank::script::open_template(&guest, &Default::default())
    };
    let deepest = (1..64).take_while(|&depth| open(depth).is_ok()).last().unwrap();
    assert!(deepest >= 8, "{deepest}");
    let template = open(deepest).unwrap();
    let thread = std::thread::Builder::new().stack_size(2 << 20).spawn(move || {
        let mut template = template.open().unwrap();
        template.configure(&["input".into()]).unwrap();
        let row = host::data::template::Row { id: 0, cells: vec![Cell::Text("x".into())] };
        template.render(vec![row]).unwrap_err().to_string()
    });
    let error = thread.unwrap().join().unwrap();
    assert!(error.contains("Stack overflow") || error.contains("too deep"), "{error}");
}

/// What Rhai has and a guest does not.
#[test]
fn what_is_not_to_be_had() {
    use insta::assert_snapshot;
    assert_snapshot!(script_error("sleep(1000000000);"), @"
    error: recipe `[DIR]/recipe.rhai` failed before the first step
      --> [DIR]/recipe.rhai:1:1
    cause: no function `sleep (i64)`
    ");
    assert_snapshot!(script_error("let now = timestamp();"), @"
    error: recipe `[DIR]/recipe.rhai` failed before the first step
      --> [DIR]/recipe.rhai:1:11
    cause: no function `timestamp ()`
    ");
    assert_snapshot!(script_error("exit();"), @"
    error: recipe `[DIR]/recipe.rhai` failed before the first step
      --> [DIR]/recipe.rhai:1:1
    cause: no function `exit ()`
    ");
    assert_snapshot!(script_error("parse_json(\"[\");"), @"
    error: recipe `[DIR]/recipe.rhai` failed before the first step
      --> [DIR]/recipe.rhai:1:1
    cause: no function `parse_json (&str | ImmutableString | String)`
    ");
    assert_snapshot!(script_error("let b = blob(1000000000);"), @"
    error: recipe `[DIR]/recipe.rhai` failed before the first step
      --> [DIR]/recipe.rhai:1:9
    cause: no function `blob (i64)`
    ");
    assert_snapshot!(script_error("let f = Fn(\"eval\"); f.call(\"1\");"), @"
    error: recipe `[DIR]/recipe.rhai` failed before the first step
      --> [DIR]/recipe.rhai:1:12
    cause: Syntax error: 'eval' is a reserved keyword
    ");
    assert_snapshot!(script_error("let f = |x| x; loop { f = f.curry(f); }"), @"
    error: cannot read the script `[DIR]/recipe.rhai`
      --> [DIR]/recipe.rhai:1:29
    cause: Expecting name of a property
    ");
    assert_snapshot!(script_error("let f = || 0; loop { let g = f; f = || g; }"), @"
    error: cannot read the script `[DIR]/recipe.rhai`
      --> [DIR]/recipe.rhai:1:40
    cause: Undefined variable: g
    hint: a function, `|x| …` too, sees its parameters alone; a `for` loop sees what is around it
    hint: `const` makes what `global::NAME` reads
    ");
    assert_snapshot!(script_error("import \"/etc/passwd\" as p;"), @"
    error: cannot read the script `[DIR]/recipe.rhai`
      --> [DIR]/recipe.rhai:1:1
    cause: 'import' is a reserved keyword
    ");
    assert_snapshot!(script_error("let x = open(\"/etc/passwd\");"), @"
    error: recipe `[DIR]/recipe.rhai` failed before the first step
      --> [DIR]/recipe.rhai:1:9
    cause: no function `open (&str | ImmutableString | String)`
    hint: `open` is used as `host::open()`
    ");
    assert_snapshot!(script_error("let x = get_fn_metadata_list();"), @"
    error: recipe `[DIR]/recipe.rhai` failed before the first step
      --> [DIR]/recipe.rhai:1:9
    cause: no function `get_fn_metadata_list ()`
    ");
}

#[test]
fn recursion_by_way_of_the_engine() {
    use insta::assert_snapshot;
    assert_snapshot!(script_error("fn f(x) { [x].map(|y| f(y)) }\nf(1);"), @"
    error: recipe `[DIR]/recipe.rhai` failed before the first step
      --> [DIR]/recipe.rhai:1:15
    cause: Stack overflow
    cause: in `map`, called at line 1
    cause: in `f`, called at line 1
    cause: in `|…|`, called at line 1
    cause: in `map`, called at line 1
    cause: in `f`, called at line 1
    cause: in `|…|`, called at line 1
    cause: in `map`, called at line 1
    cause: in `f`, called at line 1
    ");
    assert_snapshot!(script_error("fn f(x) { let a = [2, 1]; a.sort(|p, q| { f(p); 0 }); }\nf(1);"), @"
    error: recipe `[DIR]/recipe.rhai` failed before the first step
    cause: it returned without taking a step, so nothing is trained
    hint: take steps until `run.next_step()` gives none
    ");
    assert_snapshot!(script_error("fn f(x) { let g = Fn(\"f\"); g.call(x) }\nf(1);"), @"
    error: recipe `[DIR]/recipe.rhai` failed before the first step
      --> [DIR]/recipe.rhai:2:1
    cause: Stack overflow
    ");
    assert_snapshot!(script_error("fn f(x) { try { f(x); } catch (e) { f(x); } }\nf(1);"), @"
    error: recipe `[DIR]/recipe.rhai` failed before the first step
      --> [DIR]/recipe.rhai:2:1
    cause: Stack overflow
    ");
}

#[test]
fn loops_of_every_kind() {
    for text in [
        "for i in 0..9223372036854775807 { }",
        "while true { try { throw 1; } catch { } }",
        "do { } until false;",
        "loop { host::log(\"x\"); }",
        "loop { print(\"x\"); debug(\"y\"); }",
        "fn f() { loop { } } f();",
        "[1].map(|x| { loop { } });",
        "[1, 2].sort(|x, y| { loop { } });",
        "let run = host::open(); loop { try { run.config(\"none\"); } catch { } }",
        "let run = host::open(); loop { try { host::open(); } catch { } }",
        "let run = host::open(); loop { let m = run.model; }",
        "let run = host::open(); let s = run.next_step(); let t = s.next_batch().labels(); loop { t.detach(); }",
    ] {
        let report = script_error(text);
        assert!(report.contains("cause: the guest computed for more than 0.4 s"), "{text}: {report}");
    }
}

#[test]
fn names_that_mislead() {
    use insta::assert_snapshot;
    assert_snapshot!(script_error("let h\u{43e}st = 1;"), @"
    error: cannot read the script `[DIR]/recipe.rhai`
      --> [DIR]/recipe.rhai:1:6
    cause: Unexpected 'о'
    ");
    assert_snapshot!(script_error("let a\u{202e}b = 1;"), @"
    error: cannot read the script `[DIR]/recipe.rhai`
      --> [DIR]/recipe.rhai:1:6
    cause: Unexpected '�'
    ");
    assert_snapshot!(script_error("fn print(text) { }"), @"
    error: cannot read the script `[DIR]/recipe.rhai`
      --> [DIR]/recipe.rhai:1:4
    cause: 'print' is a reserved keyword
    ");
    assert_snapshot!(script_error("fn log(text) { throw \"mine\"; }\nhost::log(\"the host's\");"), @"
    error: recipe `[DIR]/recipe.rhai` failed before the first step
    cause: it returned without taking a step, so nothing is trained
    hint: take steps until `run.next_step()` gives none
    ");
    assert_snapshot!(script_error("throw #{ message: \"\\x1b[2Jforged\\nerror: x\", hint: \"\\x1b]0;title\\x07\" };"), @"
    error: recipe `[DIR]/recipe.rhai` failed before the first step
      --> [DIR]/recipe.rhai:1:1
    cause: �[2Jforged�error: x
    hint: �]0;title�
    ");
    assert_snapshot!(script_error("throw #{ code: 1 };"), @r#"
    error: recipe `[DIR]/recipe.rhai` failed before the first step
      --> [DIR]/recipe.rhai:1:1
    cause: the script threw #{"code": 1}
    "#);
}

#[test]
fn turns_out_of_order() {
    use insta::assert_snapshot;
    let begun = "let run = host::open(); let step = run.next_step(); let batch = step.next_batch();\n";
    let after = |text: &str| script_error(&format!("{begun}{text}"));
    let finished = "while step.next_batch() != () { }\nstep.finish();\n";
    assert_snapshot!(after("run.next_step();"), @"
    error: recipe `[DIR]/recipe.rhai` failed at step 1
      --> [DIR]/recipe.rhai:2:5
    cause: the step before this one is not finished
    hint: call `step.finish()` when all its batches are done
    ");
    assert_snapshot!(after("step.finish();"), @"
    error: recipe `[DIR]/recipe.rhai` failed at step 1
      --> [DIR]/recipe.rhai:2:6
    cause: the step has batches that were not taken
    hint: take batches until `step.next_batch()` gives none, then finish
    ");
    assert_snapshot!(after(&format!("{finished}step.finish();")), @"
    error: recipe `[DIR]/recipe.rhai` failed at step 1
      --> [DIR]/recipe.rhai:4:6
    cause: this step is finished
    hint: take the next one with `run.next_step()`
    ");
    assert_snapshot!(after(&format!("{finished}run.model.loss(batch);")), @"
    error: recipe `[DIR]/recipe.rhai` failed at step 1
      --> [DIR]/recipe.rhai:4:11
    cause: this batch went with its step, which is finished
    hint: use a batch before `step.finish()`
    ");
    assert_snapshot!(after(&format!("let l = run.model.loss(batch);\n{finished}l.sum.item(\"local\");")), @"
    error: recipe `[DIR]/recipe.rhai` failed at step 1
      --> [DIR]/recipe.rhai:5:7
    cause: this tensor of shape [] went with its step, which is finished
    hint: read what is needed later as a number, with `item()`, before `step.finish()`
    ");
    assert_snapshot!(after("step.next_batch(); run.model.loss(batch);"), @"
    error: recipe `[DIR]/recipe.rhai` failed at step 1
      --> [DIR]/recipe.rhai:2:30
    cause: this batch went when the next one was asked for
    hint: finish with a batch before calling `step.next_batch()` again
    ");
    assert_snapshot!(after("let l = run.model.loss(batch); step.backward(l.sum, 0);"), @"
    error: recipe `[DIR]/recipe.rhai` failed at step 1
      --> [DIR]/recipe.rhai:2:37
    cause: the weight of a loss must be a finite number above 0, not 0
    hint: pass what the sum is summed over: `batch.num_labels` for a loss over label tokens
    ");
    assert_snapshot!(after("let l = run.model.loss(batch); step.backward(l.sum, 1.0 / 0.0);"), @"
    error: recipe `[DIR]/recipe.rhai` failed at step 1
      --> [DIR]/recipe.rhai:2:37
    cause: the weight of a loss must be a finite number above 0, not inf
    hint: pass what the sum is summed over: `batch.num_labels` for a loss over label tokens
    ");
    assert_snapshot!(after("let l = run.model.loss(batch); step.backward(l.sum, l.weight); step.backward(l.sum, l.weight);"), @"
    error: recipe `[DIR]/recipe.rhai` failed at step 1
      --> [DIR]/recipe.rhai:2:69
    cause: `backward` went through what led to this sum before
    hint: add the sums of a batch up, then call `backward` once
    ");
}

/// Numbers that make no tensor.
#[test]
fn sizes_that_are_none() {
    use insta::assert_snapshot;
    let begun = "let run = host::open(); let step = run.next_step(); let t = run.model.logits(step.next_batch());\n";
    let after = |text: &str| script_error(&format!("{begun}{text}"));
    assert_snapshot!(after("t.reshape([1 << 40]);"), @"
    error: recipe `[DIR]/recipe.rhai` failed at step 1
      --> [DIR]/recipe.rhai:2:3
    cause: `reshape`: a tensor of shape [7, 11] does not fit the shape [1099511627776]
    hint: one size may be -1, for what is left
    ");
    assert_snapshot!(after("t.reshape([-1, -1]);"), @"
    error: recipe `[DIR]/recipe.rhai` failed at step 1
      --> [DIR]/recipe.rhai:2:3
    cause: `reshape`: a tensor of shape [7, 11] does not fit the shape [-1, -1]
    hint: one size may be -1, for what is left
    ");
    assert_snapshot!(after("t.expand([1 << 40, 7, 11]);"), @"
    error: recipe `[DIR]/recipe.rhai` failed at step 1
      --> [DIR]/recipe.rhai:2:3
    cause: `expand` would make a tensor of shape [1099511627776, 7, 11], and a guest's may have at most 2147483648 elements
    ");
    assert_snapshot!(after("t.narrow(0, 0, 1 << 62);"), @"
    error: recipe `[DIR]/recipe.rhai` failed at step 1
      --> [DIR]/recipe.rhai:2:3
    cause: `narrow`: 4611686018427387904 from 0 on is more than dimension 0 of [7, 11] has
    ");
    assert_snapshot!(after("t.sum_dim(9223372036854775807);"), @"
    error: recipe `[DIR]/recipe.rhai` failed at step 1
      --> [DIR]/recipe.rhai:2:3
    cause: `sum_dim` over dimension 9223372036854775807, but shape [7, 11] has dimensions -2 to 1
    ");
    assert_snapshot!(after("t.gather(-1, t);"), @"
    error: recipe `[DIR]/recipe.rhai` failed at step 1
      --> [DIR]/recipe.rhai:2:3
    cause: `gather` needs an index of integers, such as `batch.labels()`, not floats [7, 11]
    hint: `to_int()` makes integers
    ");
}
