//! The program: parse, log, dispatch, print an error once, turn it into an exit code.

use std::io::IsTerminal;
use std::process::ExitCode;

use clap::Parser;
use host::cli::{self, Cli, ui};

fn main() -> ExitCode {
    let cli = Cli::parse();
    install_logging();
    install_panic_hook();
    match cli::dispatch(cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            ui::error(&error);
            ExitCode::from(error.exit_code())
        }
    }
}

/// `HOST_LOG` takes what `RUST_LOG` takes elsewhere; the log is talk, so it goes to stderr.
fn install_logging() {
    let filter = tracing_subscriber::EnvFilter::try_from_env("HOST_LOG").unwrap_or_else(|_| "warn".into());
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .with_target(false)
        .init();
}

/// A panic is a defect: exit code 101, and a line that says whose.
fn install_panic_hook() {
    let print = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        if host::panics::is_expected() {
            return;
        }
        print(info);
        eprintln!("error: this is a bug of host {}; please report it with the lines above", env!("CARGO_PKG_VERSION"));
    }));
}
