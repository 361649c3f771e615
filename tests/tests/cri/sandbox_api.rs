//! A Pod that the shim itself is: `sandboxer = "shim"`, without a pause container.

use crate::{
    container::exec_sync,
    pod::{is_ready, named, names, share, sysctls, tell},
};
use anyhow::{Context, Result, ensure};
use serde_json::json;
use walnut_tests::cri::{Cri, Pod};

pub(crate) fn a_pod_that_is_the_shims(cri: &Cri) -> Result<()> {
    tell(
        named(cri)?,
        &[
            ("a Pod that is ready", is_ready),
            ("it is listed", listed),
            ("containers share the Pod's network and IPC", share),
            ("ExecSync", exec_sync),
            ("hostname, names, DNS", names),
            ("sysctls", sysctls),
        ],
    )
}

fn listed(pod: &mut Pod<'_>) -> Result<()> {
    let list = pod.cri().call("ListPodSandbox", json!({}))?;
    let items = list["items"].as_array().context("no list")?;
    let listed = items.iter().find(|item| item["id"] == pod.id.as_str());
    let listed = listed.with_context(|| format!("it is not in {list}"))?;
    ensure!(
        listed["state"] == "SANDBOX_READY" && listed["runtime_handler"] == "walnut-sandbox",
        "{listed}"
    );
    Ok(())
}
