//! Recipes that go another way on one rank than on the others: every rank stops at once, and says where each of them was.

use insta::assert_snapshot;

use crate::case::{Case, Ended};

const WASM: &str = "guests/apart.wasm";
/// The same as `WASM`, by what a script does of it.
const SCRIPT: &str = "let run = host::open();
let what = run.config(\"recipe.apart\");
let was_largest = false;
for step in run.steps() {
    let sum = ();
    for batch in step.batches() {
        if what == \"computes\" && was_largest {
            run.model.logits(batch);
        }
        let loss = run.model.loss(batch);
        step.backward(loss.sum, loss.weight);
        let more = batch.labels().to_float().sum();
        sum = if sum == () { more } else { sum + more };
    }
    was_largest = sum.item(\"max\") == sum.item(\"local\");
    if what == \"leaves\" && was_largest {
        return;
    }
    if what == \"reads\" && was_largest {
        sum.item(\"sum\");
    }
    if what == \"reads_more\" {
        host::from_numbers(if was_largest { [1.0, 2.0] } else { [1.0] }).numbers(\"mean\");
    }
    step.finish();
}
if what == \"reads_at_the_end\" && was_largest {
    host::from_numbers([1.0]).item(\"sum\");
}
";

/// What a run on two ranks says. Were it to wait for its timeout, [`Ended::of`] would give up.
#[track_caller]
fn report(recipe: &str, what: &str) -> String {
    report_of(recipe, what, &[])
}

#[track_caller]
fn report_of(recipe: &str, what: &str, settings: &[&str]) -> String {
    let case = Case::new();
    case.write("apart.rhai", SCRIPT);
    let ended =
        Ended::of(&mut case.run(recipe, &[&["--nproc", "2", &format!("recipe.apart={what}")], settings].concat()));
    assert!(what == "reads_at_the_end" || case.checkpoints("out").is_empty());
    ended.report()
}

#[test]
fn a_recipe_that_leaves_on_one_rank() {
    assert_snapshot!(report("apart.rhai", "leaves"), @r#"
    exit 1
    error: the recipe did not do the same on all ranks
      --> apart.rhai:25:10
    cause: rank 0: end of step 1, at apart.rhai:25:10
    cause: rank 1: return from the recipe, in step 1
    hint: batches differ from rank to rank: decide by what is the same on all, such as a number read with `item("sum")`
    "#);
    assert_snapshot!(report(WASM, "leaves"), @r#"
    exit 1
    error: the recipe did not do the same on all ranks
      --> tests/scripting/guests/apart/src/lib.rs:35
    cause: rank 0: end of step 1, at tests/scripting/guests/apart/src/lib.rs:35
    cause: rank 1: return from the recipe, in step 1
    hint: batches differ from rank to rank: decide by what is the same on all, such as a number read with `item("sum")`
    "#);
}

#[test]
fn a_number_that_one_rank_reads() {
    assert_snapshot!(report("apart.rhai", "reads"), @r#"
    exit 1
    error: the recipe did not do the same on all ranks
      --> apart.rhai:20:13
      --> apart.rhai:25:10
    cause: rank 0: end of step 1, at apart.rhai:25:10
    cause: rank 1: reading of a number over all ranks (sum), in step 1, at apart.rhai:20:13
    hint: batches differ from rank to rank: decide by what is the same on all, such as a number read with `item("sum")`
    "#);
    assert_snapshot!(report(WASM, "reads"), @r#"
    exit 1
    error: the recipe did not do the same on all ranks
      --> tests/scripting/guests/apart/src/lib.rs:28
      --> tests/scripting/guests/apart/src/lib.rs:35
    cause: rank 0: end of step 1, at tests/scripting/guests/apart/src/lib.rs:35
    cause: rank 1: reading of a number over all ranks (sum), in step 1, at tests/scripting/guests/apart/src/lib.rs:28
    hint: batches differ from rank to rank: decide by what is the same on all, such as a number read with `item("sum")`
    "#);
}

#[test]
fn another_count_of_numbers() {
    assert_snapshot!(report("apart.rhai", "reads_more"), @r#"
    exit 1
    error: the recipe did not do the same on all ranks
      --> apart.rhai:23:74
    cause: rank 0: reading of a number over all ranks (mean), in step 1, at apart.rhai:23:74
    cause: rank 1: reading of 2 numbers over all ranks (mean), in step 1, at apart.rhai:23:74
    hint: batches differ from rank to rank: decide by what is the same on all, such as a number read with `item("sum")`
    "#);
    assert_snapshot!(report(WASM, "reads_more"), @r#"
    exit 1
    error: the recipe did not do the same on all ranks
      --> tests/scripting/guests/apart/src/lib.rs:31
    cause: rank 0: reading of a number over all ranks (mean), in step 1, at tests/scripting/guests/apart/src/lib.rs:31
    cause: rank 1: reading of 2 numbers over all ranks (mean), in step 1, at tests/scripting/guests/apart/src/lib.rs:31
    hint: batches differ from rank to rank: decide by what is the same on all, such as a number read with `item("sum")`
    "#);
}

/// Of a model that ranks share, a forward needs all of them.
#[test]
fn a_forward_of_a_sharded_model_on_one_rank() {
    assert_snapshot!(report_of("apart.rhai", "computes", &["parallel=shard"]), @r#"
    exit 1
    error: the recipe did not do the same on all ranks
      --> apart.rhai:8:23
      --> apart.rhai:10:30
    cause: rank 0: `loss` of a batch by the model, in step 2, at apart.rhai:10:30
    cause: rank 1: `logits` of a batch by the model, in step 2, at apart.rhai:8:23
    hint: batches differ from rank to rank: decide by what is the same on all, such as a number read with `item("sum")`
    "#);
    assert_snapshot!(report_of(WASM, "computes", &["parallel=shard"]), @r#"
    exit 1
    error: the recipe did not do the same on all ranks
      --> tests/scripting/guests/apart/src/lib.rs:17
      --> tests/scripting/guests/apart/src/lib.rs:19
    cause: rank 0: `loss` of a batch by the model, in step 2, at tests/scripting/guests/apart/src/lib.rs:19
    cause: rank 1: `logits` of a batch by the model, in step 2, at tests/scripting/guests/apart/src/lib.rs:17
    hint: batches differ from rank to rank: decide by what is the same on all, such as a number read with `item("sum")`
    "#);
}

/// When the others have left, and everything is written.
#[test]
fn a_number_that_one_rank_reads_at_the_end() {
    assert_snapshot!(report("apart.rhai", "reads_at_the_end"), @r#"
    exit 1
    error: the recipe did not do the same on all ranks
      --> apart.rhai:28:31
    cause: rank 0: reading of a number over all ranks (sum), after step 5, at apart.rhai:28:31
    cause: rank 1: return from the recipe, after step 5
    hint: batches differ from rank to rank: decide by what is the same on all, such as a number read with `item("sum")`
    "#);
    assert_snapshot!(report(WASM, "reads_at_the_end"), @r#"
    exit 1
    error: the recipe did not do the same on all ranks
      --> tests/scripting/guests/apart/src/lib.rs:38
    cause: rank 0: reading of a number over all ranks (sum), after step 5, at tests/scripting/guests/apart/src/lib.rs:38
    cause: rank 1: return from the recipe, after step 5
    hint: batches differ from rank to rank: decide by what is the same on all, such as a number read with `item("sum")`
    "#);
}

/// Of the same recipes nothing is said where nothing goes apart, but how long ranks waited for each other.
#[test]
fn ranks_that_stay_together() {
    for recipe in ["apart.rhai", WASM] {
        let case = Case::new();
        case.write("apart.rhai", SCRIPT);
        let ended = Ended::of(&mut case.run(recipe, &["--nproc", "2", "recipe.apart=nothing"]));
        assert_eq!(ended.code, 0, "{}", ended.stderr);
        assert_eq!(ended.stderr.matches("a rank waited ").count(), 1, "{}", ended.stderr);
    }
}
