//! containerd's CRI, as the kubelet uses it: the same stories with Walnut and with runc, the oracle, but for the kernel.

mod container;
mod life;
mod pod;
mod sandbox_api;
mod streams;

use anyhow::{Context, Result};
use walnut_tests::{cri::Cri, ctr::Runtime, leak::Leak, requirement};

fn tell(cri: impl FnOnce() -> Result<Cri>, story: fn(&Cri) -> Result<()>) -> Result<()> {
    if requirement::containerd()?.is_none() {
        return Ok(());
    }
    let leak = Leak::watch()?;
    story(&cri()?)?;
    leak.nothing_left().context("after the story")
}

/// Each story, with each runtime; those of `walnut` with Walnut alone, those of `sandbox` by the Sandbox API.
macro_rules! stories {
    (
        both: [$($module:ident::$story:ident),* $(,)?],
        walnut: [$($ours:ident::$own:ident),* $(,)?],
        sandbox: [$($apis:ident::$api:ident),* $(,)?] $(,)?
    ) => {
        mod runc {
            $(#[test]
            fn $story() -> anyhow::Result<()> {
                super::tell(|| super::Cri::with(super::Runtime::Runc), super::$module::$story)
            })*
        }
        mod walnut {
            $(#[test]
            fn $story() -> anyhow::Result<()> {
                super::tell(|| super::Cri::with(super::Runtime::Walnut), super::$module::$story)
            })*
            $(#[test]
            fn $own() -> anyhow::Result<()> {
                super::tell(|| super::Cri::with(super::Runtime::Walnut), super::$ours::$own)
            })*
        }
        mod sandbox {
            $(#[test]
            fn $api() -> anyhow::Result<()> {
                super::tell(super::Cri::by_sandbox_api, super::$apis::$api)
            })*
        }
    };
}

stories! {
    both: [
        pod::a_pod_and_its_containers,
        pod::what_containers_may_do,
        container::how_containers_live_and_end,
        pod::processes_of_a_pod_that_shares_them,
        streams::exec_attach_and_port_forward,
        life::the_end_of_a_pod_with_all_in_it,
        life::containerd_restarts_under_a_pod,
        life::many_pods_at_once,
    ],
    // runc's shim is left behind now and then when its Pod is removed half made.
    walnut: [life::a_pod_is_removed_while_it_starts],
    sandbox: [sandbox_api::a_pod_that_is_the_shims, life::the_end_of_a_pod_with_all_in_it],
}
