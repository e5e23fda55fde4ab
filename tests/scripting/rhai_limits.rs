//! What a script must not do, and what its author reads about it.

use crate::support::script_error;

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
    opens_twice: "host::open();\nhost::open();" => r#"
    error: recipe `[DIR]/recipe.rhai` failed before the first step
      --> [DIR]/recipe.rhai:2:7
    cause: the run is open already
    hint: call `open` once
    "#;
}

#[test]
fn a_map_grows_until_the_time_is_up() {
    // Rhai does not look at a map's size when an entry is set by index: guest time is what bounds it.
    let report = script_error("let m = #{};\nlet i = 0;\nloop {\n    m[`k${i}`] = i;\n    i += 1;\n}");
    assert!(report.contains("the guest computed for more than 0.4 s"), "{report}");
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
        let row = host::data::template::Row { id: 0, cells: vec![Some("x".into())] };
        template.render(&[row]).unwrap_err().to_string()
    });
    let error = thread.unwrap().join().unwrap();
    assert!(error.contains("Stack overflow") || error.contains("too deep"), "{error}");
}
